"""Weights of BEiT's architecture: files of BEiT, SimMIM (ViT), ConMIM and timm in, names of fine-tuning codes out."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from mimfast._check import fail
from mimfast.encoders.beit import BEiT
from mimfast.encoders.inputs import Size
from mimfast.encoders.relative import EXTRA, NAME

SHARED = f"rel_pos_bias.{NAME}"
OWN = f"blocks.0.attn.{NAME}"
# beside the encoder: heads of all kinds, what follows from the sizes, and the norm after the mean over patches
BESIDE = re.compile(r"(decoder|head|lm_head|projectors|fc_norm)\..*|.*\.(relative_position_index|k_bias)")
OP = "read_beit"


def read_beit(state: Mapping[str, Tensor], img_size: Size | None = None, heads: int | None = None) -> BEiT:
    """The encoder of a state dict, its sizes read from the shapes.

    Args:
        state: of BEiT, SimMIM (the encoder under "encoder."), ConMIM or timm's beit models; tables shared or not.
        img_size: None stands for the square size of the file; another one has the tables resized, as `BEiT.at` does.
        heads: needed only where no table of relative bias says it.
    Returns:
        BEiT, in training mode. A file that normalises after its mean over patches has no `norm`: 1 and 0 stay there.
    Raises:
        UserError: names that do not belong to this architecture, or whose sizes do not fit together.
    """
    own = encoder_names(state)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.gamma_1"):
        if name not in own:
            found = ", ".join(list(own)[:4]) or "no names"
            fail(OP, "state", f"names like {found}", f"those of BEiT with {name!r}", "they are told apart by it")
    beit = BEiT(**_sizes(own, heads))
    fits = {name: tuple(value.shape) for name, value in beit.state_dict().items()}
    for name in {**own, **fits}:
        if name in ("norm.weight", "norm.bias") and name not in own:
            continue
        if name not in own or name not in fits or tuple(own[name].shape) != fits[name]:
            found, wanted = (f"{name} {tuple(own[name].shape)}" if name in own else f"no {name}"), fits.get(name)
            fail(OP, "state", found, "none" if wanted is None else f"shape {wanted}", "the other shapes say so")
    beit.load_state_dict(own, strict=False)
    if img_size is None:
        return beit
    other = beit.at(img_size)
    if other.grid == beit.grid:
        return beit
    resized = BEiT(**other.config)
    resized.load_state_dict(other.state_dict())
    return resized


def encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict under its own names: no prefix, no heads, no buffers."""
    inside = any(name.startswith("encoder.") for name in state)
    own = {name.removeprefix("encoder."): x for name, x in state.items() if not inside or name.startswith("encoder.")}
    return {name: x for name, x in own.items() if not BESIDE.fullmatch(name)}


def fine_tuning_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the fine-tuning codes of BEiT, SimMIM and ConMIM, and timm (strictly, num_classes=0) load.

    The shared table becomes one for each block, and the mask token is left out.

    Args:
        state: `BEiT.state_dict()`, or a file as `read_beit` takes.
    """
    own = encoder_names(state)
    own.pop("mask_token", None)
    shared = own.pop(SHARED, None)
    if shared is not None:
        for block in range(_depth(own)):
            own[f"blocks.{block}.attn.{NAME}"] = shared.clone()
    return own


def _sizes(own: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """The arguments of `BEiT` that the shapes tell."""
    dim, _, patch, _ = own["patch_embed.proj.weight"].shape
    table, positions = own.get(SHARED, own.get(OWN)), own.get("pos_embed")
    if table is not None:
        side, heads = (isqrt(len(table) - EXTRA) + 1) // 2, table.shape[1]
    elif positions is not None:
        side = isqrt(positions.shape[1] - 1)
    else:
        fail(OP, "state", "neither a table of relative bias nor positions", "one of them", "it tells the grid")
    return {
        "img_size": side * patch,
        "patch": patch,
        "dim": dim,
        "depth": _depth(own),
        "heads": max(1, dim // 64) if heads is None else heads,
        "mlp_ratio": len(own["blocks.0.mlp.fc1.weight"]) / dim if "blocks.0.mlp.fc1.weight" in own else 4.0,
        "relative": "shared" if SHARED in own else "block" if OWN in own else "none",
        "positions": "none" if positions is None else "learned",
        "mask_token": "mask_token" in own,
    }


def _depth(own: Mapping[str, Tensor]) -> int:
    return 1 + max(int(found[1]) for name in own if (found := re.match(r"blocks\.(\d+)\.", name)))
