"""Which method and backbone a state dict belongs to: FastMIM, SimMIM, MaskFeat; ViT, BEiT, Swin, PVTv2.

What is here reads names and shapes and gives the plain values that build the model; `mimfast.layouts` does the rest.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from mimfast._check import fail
from mimfast._weights import Weights
from mimfast.encoders import pvt_names
from mimfast.encoders.beit_names import SHARED
from mimfast.encoders.swin_names import official_names

TABLE = "relative_position_bias_table"
FIRST_STAGED = "layers.0.blocks.0.attn.qkv.weight"
OWN_TABLE = f"attn.{TABLE}"
# what some files hold beside weights
BUFFERS = re.compile(r"hogs\..*|(.*\.)?(relative_position_index|relative_coords_table|attn_mask|k_bias)")
# of the published ViTs, by width
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
PVT: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((32, 64, 160, 256), (2, 2, 2, 2)): "pvt_v2_b0",
    ((64, 128, 320, 512), (2, 2, 2, 2)): "pvt_v2_b1",
    ((64, 128, 320, 512), (3, 4, 6, 3)): "pvt_v2_b2",
    ((64, 128, 320, 512), (3, 4, 18, 3)): "pvt_v2_b3",
    ((64, 128, 320, 512), (3, 8, 27, 3)): "pvt_v2_b4",
    ((64, 128, 320, 512), (3, 6, 40, 3)): "pvt_v2_b5",
}


@dataclass(frozen=True)
class Given:
    """What the caller of `load` says, None where nothing."""

    img_size: tuple[int, int] | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    norm: bool | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Found:
    """The layout in words, the `config` of the model, and the state under our names."""

    layout: str
    config: dict[str, Any]
    state: dict[str, Tensor]


def recognise(weights: Weights, given: Given) -> Found | None:
    """What the source is, or None when it is a plain ViT or a MAE, or nothing known."""
    own, prefix = weights.config, "encoder." if any(key.startswith("encoder.") for key in weights.state) else ""
    method = own.get("method") if own else _method(weights.state)
    kind = _backbone(weights.state, prefix)
    named = not {"name", "relative"}.isdisjoint(own.get("encoder", own))
    if method == "MAE" or (method is None and not named and kind in (None, "vit")) or not (own or kind):
        return None
    state = _ours(weights.state, prefix, kind)
    if own:
        return Found("mimfast", _resized_config(own, given), state)
    assert kind is not None
    encoder = _ENCODERS[kind](weights, prefix, given, method)
    if method is None:
        return Found(f"{_FAMILY[kind]} encoder", encoder, state)
    config = _METHOD[method](weights, encoder, kind, given)
    return Found(f"official {method}", config, state)


def _method(state: Mapping[str, Tensor]) -> str | None:
    if "pred_head.projections.0.weight" in state:
        return "MaskFeat"
    if "decoder.0.weight" in state and "encoder.mask_token" in state:
        return "SimMIM"
    token = state.get("mask_token")
    if "decoder_pred.weight" in state and token is not None and tuple(token.shape) == (1, 3, 1, 1):
        return "FastMIM"
    if "decoder_pred.weight" in state and f"encoder.{FIRST_STAGED}" in state:
        return "GreenMIM"
    if "decoder_pred.weight" in state and FIRST_STAGED in state:
        return "MixMIM"
    return None


def _backbone(state: Mapping[str, Tensor], prefix: str) -> str | None:
    def has(name: str) -> bool:
        return prefix + name in state

    if has("stem_conv1.weight"):
        reason = "there is no CMT here and timm has none"
        fail("load", "source", "the weights of a CMT", "a ViT, BEiT, Swin or PVTv2", reason)
    if has("patch_embed1.proj.weight") or has("stages.0.blocks.0.attn.kv.weight"):
        return "pvt"
    if has(FIRST_STAGED):
        return "mixswin" if has("absolute_pos_embed") else "swin"
    if has("blocks.0.attn.q_bias"):
        return "beit"
    return "vit" if has("blocks.0.attn.qkv.weight") else None


def _ours(state: Mapping[str, Tensor], prefix: str, kind: str | None) -> dict[str, Tensor]:
    """The state under the names of our modules, without what is computed from the sizes."""
    found = {key: value for key, value in state.items() if not BUFFERS.fullmatch(key)}
    if kind in ("swin", "mixswin"):
        return official_names(found, prefix)
    if kind == "pvt":
        return {
            prefix + pvt_names.timm_name(key.removeprefix(prefix)) if key.startswith(prefix) else key: value
            for key, value in found.items()
        }
    return found


def _resized_config(config: dict[str, Any], given: Given) -> dict[str, Any]:
    """Our own values, with what the caller says instead."""
    config = {**config}
    if given.ratio is not None and "ratio" in config:
        config["ratio"] = given.ratio
    if given.img_size is not None:
        size = {"img_size": list(given.img_size)}
        if "encoder" in config:
            config["encoder"] = {**config["encoder"], **size}
        else:
            config |= size
    return config


def _vit(weights: Weights, prefix: str, given: Given, method: str | None) -> dict[str, Any]:
    state, notes = weights.state, weights.notes
    dim, _, patch, _ = state[f"{prefix}patch_embed.proj.weight"].shape
    heads = given.heads
    if heads is None and method == "FastMIM":
        heads = max(1, dim // 128)
        why = "as FastMIM pre-trains with; it fine-tunes with twice as many"
        notes.append(f"assumed heads={heads}, {why}; pass heads= if it is another")
    elif heads is None:
        heads = HEADS.get(dim, max(1, dim // 64))
        notes.append(f"assumed heads={heads} at width {dim}; pass heads= if it is another")
    more: dict[str, Any] = {"positions": "learned", "mask_token": True} if method == "MaskFeat" else {}
    return {
        "img_size": list(given.img_size or square_size(state[f"{prefix}pos_embed"].shape[1] - 1, patch)),
        "patch": patch,
        "dim": dim,
        "depth": count(state, rf"{prefix}blocks\.(\d+)\."),
        "heads": heads,
        "mlp_ratio": state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] / dim,
        **more,
    }


def _beit(weights: Weights, prefix: str, given: Given, method: str | None) -> dict[str, Any]:  # noqa: ARG001
    state = weights.state
    dim, _, patch, _ = state[f"{prefix}patch_embed.proj.weight"].shape
    shared = state.get(f"{prefix}{SHARED}")
    table = state.get(f"{prefix}blocks.0.{OWN_TABLE}") if shared is None else shared
    pos = state.get(f"{prefix}pos_embed")
    if table is None and pos is None and given.img_size is None:
        fail("load", "img_size", "None", "(height, width) in pixels", "without positions the weights do not say")
    side = square_size(pos.shape[1] - 1, patch)[0] if pos is not None else 224
    if table is not None:
        side = (isqrt(table.shape[0] - 3) + 1) // 2 * patch
    heads = given.heads or (table.shape[1] if table is not None else HEADS.get(dim, max(1, dim // 64)))
    return {
        "img_size": list(given.img_size or (side, side)),
        "patch": patch,
        "dim": dim,
        "depth": count(state, rf"{prefix}blocks\.(\d+)\."),
        "heads": heads,
        "mlp_ratio": state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "relative": "none" if table is None else "block" if shared is None else "shared",
        "positions": "none" if pos is None else "learned",
        "mask_token": f"{prefix}mask_token" in state,
    }


def _swin(weights: Weights, prefix: str, given: Given, method: str | None) -> dict[str, Any]:
    state = official_names(weights.state, prefix)
    stages = range(count(state, rf"{prefix}layers\.(\d+)\."))
    depths = [count(state, rf"{prefix}layers\.{i}\.blocks\.(\d+)\.") for i in stages]
    width = state[f"{prefix}patch_embed.proj.weight"].shape[0]
    first = [f"{prefix}layers.{i}.blocks.0." for i in stages]
    version, counted = ("swinv2", "logit_scale") if f"{first[0]}attn.logit_scale" in state else ("swin", TABLE)
    heads = [state[f"{block}attn.{counted}"].shape[0 if version == "swinv2" else 1] for block in first]
    window = _window(weights, f"{first[0]}attn.")
    stride = 4 * 2 ** (len(depths) - 1)
    # the window grows with the image, but in V2 12 and 16 go with 192 and 256 px
    side = weights.args.get("input_size") if method == "SimMIM" else None
    side = side or window * (stride if version == "swin" or window <= 8 else 16)
    size = given.img_size or (side, side)
    return {
        "name": version,
        "img_size": list(size),
        "embed_dim": width,
        "depths": depths,
        "heads": heads,
        "window": None if min(size) == window * stride or (version == "swin" and given.img_size) else window,
        "mlp_ratio": state[f"{first[0]}mlp.fc1.weight"].shape[0] / width,
        "mask_token": f"{prefix}mask_token" in state,
    }


def _mixswin(weights: Weights, prefix: str, given: Given, method: str | None) -> dict[str, Any]:
    found = _swin(weights, prefix, given, method)
    stages, patches = len(found["depths"]), weights.state[f"{prefix}absolute_pos_embed"].shape[1]
    windows = [_window(weights, f"{prefix}layers.{i}.blocks.0.attn.") for i in range(stages)]
    own = square_size(patches, 4)
    last = own[0] // (4 * 2 ** (stages - 1))
    usual = [min(2 * last, last * 2 ** (stages - 1 - i)) for i in range(stages)]
    # another size gets the windows that go with it
    kept = windows if windows != usual and given.img_size in (None, own) else None
    token = found["mask_token"] and method is None  # the method's own has the same name
    size = list(given.img_size or own)
    return found | {"name": "mixswin", "img_size": size, "window": kept, "mask_token": token}


def _window(weights: Weights, attn: str) -> int:
    """Side of the window, from the table or what is stored beside weights."""
    state = weights.state
    if f"{attn}{TABLE}" in state:
        return (isqrt(len(state[f"{attn}{TABLE}"])) + 1) // 2
    if f"{attn}relative_position_index" in state:
        return isqrt(len(state[f"{attn}relative_position_index"]))
    weights.notes.append("assumed windows of 8 tokens, which the source does not say")
    return 8


def _pvt(weights: Weights, prefix: str, given: Given, method: str | None) -> dict[str, Any]:
    state = {
        pvt_names.official_name(key.removeprefix(prefix)): value
        for key, value in weights.state.items()
        if key.startswith(prefix)
    }
    depths = tuple(count(state, rf"block{s}\.(\d+)\.") for s in (1, 2, 3, 4))
    dims = tuple(state[f"patch_embed{s}.proj.weight"].shape[0] for s in (1, 2, 3, 4))
    name = PVT.get((dims, depths))
    if name is None:
        fail("load", "source", f"a PVTv2 with widths {dims} and depths {depths}", "pvt_v2_b0 to b5", "timm has these")
    if name == "pvt_v2_b2" and "block4.0.attn.sr.weight" in state:
        name = "pvt_v2_b2_li"
    size = given.img_size or ((128, 128) if method == "FastMIM" else (224, 224))
    return {"name": f"timm:{name}", "img_size": list(size)}


def _fastmim(weights: Weights, encoder: dict[str, Any], kind: str, given: Given) -> dict[str, Any]:
    state, notes = weights.state, weights.notes
    stride, plain = encoder.get("patch", 32), kind == "vit"
    out_dim, width = state["decoder_pred.weight"].shape
    fc1 = state.get("decoder_blocks.0.mlp.fc1.weight")
    hog = out_dim == 27 * (stride // 8) ** 2
    norm = first_known("norm", True, notes, given.norm, weights.args.get("norm_pix_loss"))
    decoder = {
        "dim": width,
        "depth": count(state, r"decoder_blocks\.(\d+)\."),
        "heads": given.decoder_heads or max(1, width // 32),
        "mlp_ratio": 4.0 if fc1 is None else fc1.shape[0] / width,
        "eps": 1e-6 if plain else 1e-5,
    }
    return {
        "method": "FastMIM",
        "encoder": encoder,
        "decoder": decoder,
        "target": {"type": "HOG", "normalize": norm} if hog else {"type": "Pixels", "norm": norm},
        "ratio": first_known("ratio", 0.75, notes, given.ratio, weights.args.get("mask_ratio")),
        "block": weights.args.get("block_size") or stride,
    }


def _simmim(weights: Weights, encoder: dict[str, Any], kind: str, given: Given) -> dict[str, Any]:  # noqa: ARG001
    ratio = first_known("ratio", 0.6, weights.notes, given.ratio, weights.args.get("mask_ratio"))
    target = {"type": "Pixels", "norm": False, "kind": "l1", "order": "cpq"}
    block = weights.args.get("block_size") or 32
    return {"method": "SimMIM", "encoder": encoder, "target": target, "ratio": ratio, "block": block}


def _mixmim(weights: Weights, encoder: dict[str, Any], kind: str, given: Given) -> dict[str, Any]:  # noqa: ARG001
    ratio = first_known("ratio", 0.5, weights.notes, given.ratio, weights.args.get("mask_ratio"))
    return {"method": "MixMIM", "encoder": encoder, **_pixel_decoder(weights, given), "ratio": ratio, "shared": True}


def _greenmim(weights: Weights, encoder: dict[str, Any], kind: str, given: Given) -> dict[str, Any]:  # noqa: ARG001
    stride = 4 * 2 ** (len(encoder["depths"]) - 1)
    size = given.img_size or square_size(weights.state["decoder_pos_embed"].shape[1], stride)
    window = _window(weights, "encoder.layers.0.blocks.0.attn.")
    encoder = encoder | {"img_size": list(size), "window": None if min(size) == window * stride else window}
    ratio = first_known("ratio", 0.75, weights.notes, given.ratio, weights.args.get("mask_ratio"))
    return {"method": "GreenMIM", "encoder": encoder, **_pixel_decoder(weights, given), "ratio": ratio}


def _pixel_decoder(weights: Weights, given: Given) -> dict[str, Any]:
    """Decoder and target of methods that predict pixels as MAE does."""
    state, width = weights.state, weights.state["decoder_embed.weight"].shape[0]
    fc1 = state.get("decoder_blocks.0.mlp.fc1.weight")
    decoder = {
        "dim": width,
        "depth": count(state, r"decoder_blocks\.(\d+)\."),
        "heads": given.decoder_heads or max(1, width // 32),
        "mlp_ratio": 4.0 if fc1 is None else fc1.shape[0] / width,
    }
    norm = first_known("norm", True, weights.notes, given.norm, weights.args.get("norm_pix_loss"))
    return {"decoder": decoder, "target": {"type": "Pixels", "norm": norm}}


def _maskfeat(weights: Weights, encoder: dict[str, Any], kind: str, given: Given) -> dict[str, Any]:  # noqa: ARG001
    ratio = first_known("ratio", 0.4, weights.notes, given.ratio)
    return {"method": "MaskFeat", "encoder": encoder, "target": {"type": "HOG"}, "ratio": ratio, "min_block": 15}


def first_known(name: str, default: Any, notes: list[str], *values: Any) -> Any:
    """The first value that is not None, or the default, and then a note."""
    value = next((v for v in values if v is not None), None)
    if value is None:
        notes.append(f"assumed {name}={default}, which the source does not say")
    return default if value is None else value


def count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a name."""
    return 1 + max((int(found[1]) for key in keys if (found := re.match(pattern, key))), default=-1)


def square_size(patches: int, patch: int) -> tuple[int, int]:
    """(height, width) in pixels of a square image of so many patches."""
    side = isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        reason = f"{patches} patches are not a square grid and the source does not say which"
        fail("load", "img_size", "None", "(height, width) in pixels", reason)
    return (side * patch, side * patch)


_FAMILY = {"vit": "ViT", "beit": "BEiT", "swin": "official or timm Swin", "mixswin": "MixMIM", "pvt": "PVTv2"}
_ENCODERS = {"vit": _vit, "beit": _beit, "swin": _swin, "mixswin": _mixswin, "pvt": _pvt}
_METHOD = {
    "FastMIM": _fastmim,
    "SimMIM": _simmim,
    "MaskFeat": _maskfeat,
    "MixMIM": _mixmim,
    "GreenMIM": _greenmim,
}
