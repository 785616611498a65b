"""Hugging Face's ViTMAE names to and from the official MAE names, which are ours.

Its files have three spellings: that of the hub ("encoder.layer.0.attention.attention.query"), that of the modules of
transformers 5 ("layers.0.attention.q_proj"), and that in which some releases of 5 save a decoder
("decoder.decoder_encoder.layer.0"). All are read; the hub's, which every release reads, is written.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_OUTER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_INNER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()} | {
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = re.compile(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_DECODER_BLOCK = re.compile(r"decoder\.decoder_(?:layers|encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")
PATCH_PROJECTION = "embeddings.patch_embeddings.projection.weight"


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names for Hugging Face's; the three projections of an attention become one qkv. Unknown names stay."""
    renamed = {_ours(key): value for key, value in state.items()}
    for key in [k for k in renamed if re.search(r"\.attn\.q\.(weight|bias)$", k)]:
        parts = [re.sub(r"\.attn\.q\.", f".attn.{part}.", key) for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def to_hf(state: Mapping[str, Tensor], decoder: bool) -> dict[str, Tensor]:
    """Hugging Face's names for the official ones: of ViTMAEForPreTraining, or of ViTMAEModel without `decoder`."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, piece in zip("qkv", value.chunk(3)):
                renamed[_theirs(key.replace(".attn.qkv.", f".attn.{part}."))] = piece
        else:
            renamed[_theirs(key)] = value
    return renamed if decoder else {key.removeprefix("vit."): value for key, value in renamed.items()}


def _ours(key: str) -> str:
    for pattern, blocks in ((_BLOCK, "blocks"), (_DECODER_BLOCK, "decoder_blocks")):
        found = pattern.fullmatch(key)
        if found and found[2] in _INNER_BACK:
            return f"{blocks}.{found[1]}.{_INNER_BACK[found[2]]}.{found[3]}"
    stem, suffix = _split(key)
    if not stem.startswith(("vit.", "decoder.")):
        stem = f"vit.{stem}"
    return _OUTER_BACK[stem] + suffix if stem in _OUTER_BACK else key


def _theirs(key: str) -> str:
    found = _OUR_BLOCK.fullmatch(key)
    if found:
        stack = "decoder.decoder_layers" if found[1] else "vit.encoder.layer"
        return f"{stack}.{found[2]}.{_INNER[found[3]]}.{found[4]}"
    stem, suffix = _split(key)
    return _OUTER[stem] + suffix


def _split(key: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.+?)(\.weight|\.bias)?", key)
    assert found is not None  # keys are never empty
    return found[1], found[2] or ""
