"""Checkpoints in and out: `load` recognises whose names a file has, `export` (exports.py) writes them."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast import _names, _weights, encoders, methods
from mimfast._check import UserError
from mimfast.decoders import ViTDecoder
from mimfast.encoders import relative
from mimfast.encoders.positions import sincos_2d
from mimfast.encoders.swin import Swin
from mimfast.encoders.tables import geometric_resize
from mimfast.encoders.vit import EPS, ViT
from mimfast.exports import LAYOUTS as LAYOUTS
from mimfast.exports import Layout as Layout
from mimfast.exports import export as export
from mimfast.methods.mae import MAE
from mimfast.recognise import HEADS, TABLE, Given, count, first_known, recognise, square_size
from mimfast.targets import Pixels

log = logging.getLogger("mimfast")

FIXED = ("absolute_pos_embed", "decoder_pos_embed")  # sines and cosines
DECODER_HEADS = {512: 16}


@dataclass
class LoadReport:
    """What `load` recognised.

    Attributes:
        layout: whose names the source has.
        source: the path, or "a mapping".
        model: the sizes of what was built.
        missing: names the model has and the source has not; they keep their random initialisation.
        unexpected: names the source has and the model has not; they were left out.
        notes: everything that was assumed.
    """

    layout: str
    source: str
    model: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{self.source}: {self.layout}, {self.model}",
            f"missing: {_some(self.missing)}",
            f"unexpected: {_some(self.unexpected)}",
        ]
        return "; ".join([*parts, *self.notes])


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    img_size: int | tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    norm: bool | None = None,
    ratio: float | None = None,
) -> nn.Module:
    """Build the method (when the source has a decoder) or the encoder (when not) of a checkpoint, with its weights.

    Recognised: our own runs and exports, official MAE files (encoder only or full), timm's ViTs, Hugging Face's ViTMAE
    (folder, file or state dict); official FastMIM (ViT, Swin, PVTv2), SimMIM (Swin, ViT), MaskFeat, MixMIM and
    GreenMIM; BEiT, Swin and PVTv2 of their authors and of timm. The result carries a `load_report` (`LoadReport`),
    logged at INFO under "mimfast". Nothing in a file is executed.

    Args:
        source: file, folder, state dict, or checkpoint object that holds one.
        img_size: pixels or (height, width); needed when the grid is not square and the source does not say. For another
            size than the source's, position embeddings are resized (bicubic) and tables of relative positions too
            (geometric, as FastMIM and SimMIM do before fine-tuning).
        heads: attention heads of the encoder, when the source does not say and the width is of no published size.
        decoder_heads: the same for the decoder.
        norm: whether the target is standardised per patch; overrides the source, True when nothing says.
        ratio: mask ratio; overrides the source, 0.75 when nothing says.
    Returns:
        `MAE`, `FastMIM`, `SimMIM`, `MaskFeat`, `MixMIM`, `GreenMIM`, or the encoder, fp32 on the CPU, in training mode.
    Raises:
        UserError: a source that is missing, empty, damaged, of no known layout, inconsistent, or that asks for code.
    Warns:
        UserWarning: names are missing or unexpected.
    """
    weights = _weights.read(source)
    given = Given(_grid_given(img_size), heads, decoder_heads, norm, ratio)
    found = recognise(weights, given)
    if found is None:
        layout, state = _recognise(weights)
        config = _sizes(weights, state, given)
    else:
        layout, config, state = found.layout, found.config, found.state
    # building draws random numbers: the caller's generator must not notice
    with torch.random.fork_rng(devices=[]):
        model = _build(config)
    state = _fitted(state, model, weights.notes)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines()[1:])
        raise UserError(
            f"load: source has {weights.source!r}, expected tensors of one model because {reason}"
        ) from error
    _note_positions(model, weights.notes)
    report = LoadReport(
        layout, weights.source, _describe(config, model), list(missing), list(unexpected), weights.notes
    )
    if missing or unexpected:
        warnings.warn(f"load: {report}", stacklevel=2)
    log.info("loaded %s", report)
    model.load_report = report  # type: ignore[assignment]
    return model


def _recognise(weights: _weights.Weights) -> tuple[str, dict[str, Tensor]]:
    state = weights.state
    if any(key.removeprefix("vit.") == _names.PATCH_PROJECTION for key in state):
        layout, state = "Hugging Face ViTMAE", _names.from_hf(state)
    elif weights.config:
        layout = "mimfast"
    else:
        layout = (
            "official MAE" if "decoder_embed.weight" in state else "official MAE encoder or timm ViT (the same names)"
        )
    for key, dims in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if key not in state or state[key].ndim != dims:
            found = ", ".join(list(state)[:4])
            raise UserError(
                f"load: source has names like {found}, expected those of MAE, timm's ViT or Hugging Face's ViTMAE "
                f"because {key!r} with {dims} dimensions is not among them ({weights.source})"
            )
    return layout, state


def _sizes(weights: _weights.Weights, state: dict[str, Tensor], given: Given) -> dict[str, Any]:
    """The `config` of the model: what the tensors say, then the caller, the file, the published sizes."""
    own, hf, args, notes = weights.config, weights.hf_config, weights.args, weights.notes
    own_encoder = own.get("encoder", own)
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    size = given.img_size or own_encoder.get("img_size") or square_size(state["pos_embed"].shape[1] - 1, patch)
    encoder = {
        "img_size": list(size),
        "patch": patch,
        "dim": dim,
        "depth": count(state, r"blocks\.(\d+)\."),
        "heads": _heads("heads", dim, given.heads or own_encoder.get("heads") or hf.get("num_attention_heads"), notes),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        **{key: own_encoder[key] for key in ("positions", "mask_token") if key in own_encoder},
    }
    _note_hf(hf, notes)
    if "decoder_embed.weight" not in state:
        return encoder
    width = state["decoder_embed.weight"].shape[0]
    known_heads = given.decoder_heads or own.get("decoder", {}).get("heads") or hf.get("decoder_num_attention_heads")
    fc1 = state.get("decoder_blocks.0.mlp.fc1.weight")
    decoder = {
        "dim": width,
        "depth": count(state, r"decoder_blocks\.(\d+)\."),
        "heads": _heads("decoder_heads", width, known_heads, notes),
        "mlp_ratio": 4.0 if fc1 is None else fc1.shape[0] / width,
    }
    return {
        "method": "MAE",
        "encoder": encoder,
        "decoder": decoder,
        "ratio": first_known(
            "ratio", 0.75, notes, given.ratio, own.get("ratio"), hf.get("mask_ratio"), args.get("mask_ratio")
        ),
        "norm": first_known(
            "norm", True, notes, given.norm, own.get("norm"), hf.get("norm_pix_loss"), args.get("norm_pix_loss")
        ),
        "kind": own.get("kind", "mse"),
    }


def _heads(name: str, width: int, known: int | None, notes: list[str]) -> int:
    if known is not None:
        return known
    # the published decoder has heads of 32 channels, the encoders of 64 (H/14: 80)
    table, channels = (HEADS, 64) if name == "heads" else (DECODER_HEADS, 32)
    if width in table:
        notes.append(f"assumed {name}={table[width]}, as the published sizes have at width {width}")
        return table[width]
    guess = max(1, width // channels)
    while width % guess:
        guess -= 1
    notes.append(
        f"guessed {name}={guess} (heads of {width // guess} channels at width {width}); pass {name}= if it is another"
    )
    return guess


def _grid_given(img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


def _note_hf(hf: dict[str, Any], notes: list[str]) -> None:
    eps, act = hf.get("layer_norm_eps", EPS), hf.get("hidden_act", "gelu")
    if eps != EPS:
        notes.append(f"its layer_norm_eps is {eps:g}, ours {EPS:g}")
    if act != "gelu":
        notes.append(f"its hidden_act is {act!r}, ours the exact gelu: outputs differ")


def _fitted(state: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """The state with the tables that depend on the size resized to those of the model."""
    encoder: Any = getattr(model, "encoder", model)
    wanted, found = model.state_dict(), dict(state)
    for key, value in state.items():
        name, new = key.rpartition(".")[2], wanted.get(key)
        if name in FIXED and isinstance(encoder, Swin) and new is not None and new.shape != value.shape:
            found[key] = new
            if "made the positions anew for the image size" not in notes:
                notes.append("made the positions anew for the image size")
            continue
        if name not in (TABLE, "pos_embed") or new is None or new.shape == value.shape or new.ndim != value.ndim:
            continue
        if name == "pos_embed":
            side = isqrt(value.shape[1] - 1)
            if side * side != value.shape[1] - 1 or value.shape[2] != new.shape[2]:
                continue
            # with the authors' weights of the spline, which those of the smoothed one in `ViT.at` are not
            patches = value[:, 1:].float().mT.unflatten(-1, (side, side))
            patches = F.interpolate(patches, encoder.grid, mode="bicubic", align_corners=False).flatten(2).mT
            found[key] = torch.cat([value[:, :1], patches.to(value.dtype)], dim=1)
        elif hasattr(encoder, "cls_token"):
            side = (isqrt(value.shape[0] - relative.EXTRA) + 1) // 2
            if relative.entries((side, side)) != len(value):
                continue
            found[key] = relative.resized(value, (side, side), encoder.grid)
        else:
            source, target = ((isqrt(len(table)) + 1) // 2 for table in (value, new))
            found[key] = geometric_resize(value, source, target)
        note = f"resized the {'positions' if name == 'pos_embed' else 'tables of relative positions'} to the image size"
        if note not in notes:
            notes.append(note)
    return found


def _note_positions(model: nn.Module, notes: list[str]) -> None:
    vit = getattr(model, "encoder", model)
    if not isinstance(vit, ViT) or vit.positions == "learned":
        return
    if not torch.allclose(vit.pos_embed.detach(), sincos_2d(vit.dim, vit.grid), atol=1e-3):
        notes.append("its position embedding is not the sine-cosine table: kept as it is, and never trained here")


def _build(config: dict[str, Any]) -> nn.Module:
    if config.get("method", "MAE") != "MAE":
        return getattr(methods, config["method"]).from_config(config)
    encoder: Any = encoders.from_config(config.get("encoder", config))
    if "decoder" not in config:
        return encoder
    decoder = ViTDecoder(encoder.dim, encoder.grid, encoder.patch, **config["decoder"])
    return MAE(encoder, decoder, Pixels(encoder.patch, config["norm"], config["kind"]), config["ratio"])


def _describe(config: dict[str, Any], model: nn.Module) -> str:
    vit = config.get("encoder", config)
    height, width = vit["img_size"]
    method = config.get("method", "MAE")
    if method != "MAE" or "name" in vit:
        encoder: Any = getattr(model, "encoder", model)
        text = f"{vit.get('name', 'vit')}, tokens {encoder.dim} wide of {encoder.stride} px, {height}x{width} px"
        return f"{method} of {text}" if "encoder" in config else text
    text = (
        f"ViT {vit['dim']} wide, {vit['depth']} blocks, {vit['heads']} heads, patch {vit['patch']}, {height}x{width} px"
    )
    if "decoder" not in config:
        return text
    decoder = config["decoder"]
    return f"MAE of {text}; decoder {decoder['dim']} wide, {decoder['depth']} blocks, {decoder['heads']} heads"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) or "none") + more
