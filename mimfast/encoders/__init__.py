"""Encoders: one class per file, each usable as a plain backbone and with a mask."""

from collections.abc import Mapping
from difflib import get_close_matches
from inspect import getmembers, ismethod, signature
from typing import Any, Protocol

from torch import Tensor

from mimfast._check import fail
from mimfast.encoders.beit import BEiT as BEiT
from mimfast.encoders.embed import PatchEmbedVisible as PatchEmbedVisible
from mimfast.encoders.inputs import Size
from mimfast.encoders.mixswin import MixSwin as MixSwin
from mimfast.encoders.swin import Swin as Swin
from mimfast.encoders.swinv2 import SwinV2 as SwinV2
from mimfast.encoders.timm import Timm as Timm
from mimfast.encoders.vit import ViT as ViT
from mimfast.mask import Mask

__all__ = [
    "BEiT",
    "Encoder",
    "MixSwin",
    "PatchEmbedVisible",
    "Swin",
    "SwinV2",
    "Timm",
    "ViT",
    "build",
    "from_config",
    "names",
    "require_mode",
]


class Encoder(Protocol):
    """What a method needs of an encoder; nobody has to inherit.

    Attributes:
        stride: pixels per token side.
        dim: width of the tokens.
        prefix: tokens before those of the image in what a forward returns (class tokens).
        img_size: (height, width) in pixels that `grid` belongs to; `at` gives the encoder for another.
        grid: (rows, columns) of the tokens, row-major in what a forward returns; modes say which masks they take.
        config: the plain arguments that build it again, written beside its weights.
        mask_modes: ways it treats hidden tokens: "drop" (visible tokens only), "replace" (mask token), "mix" (two
            images), "sparse" (hidden positions stay empty), "paint" (hidden pixels are painted over, then encoded).
    """

    stride: int
    dim: int
    prefix: int
    img_size: tuple[int, int]
    grid: tuple[int, int]
    mask_modes: frozenset[str]

    @property
    def config(self) -> dict[str, Any]: ...

    def at(self, img_size: Size) -> "Encoder": ...

    def __call__(
        self, img: Tensor, mask: Mask | None = None, mode: str = "drop", *, colour: Tensor | None = None
    ) -> Tensor: ...


def require_mode(method: str, encoder: Encoder, mode: str) -> None:
    """Raise unless `encoder` offers the mask mode that `method` is built on."""
    if mode not in encoder.mask_modes:
        offered, name = sorted(encoder.mask_modes), type(encoder).__name__
        fail(
            method,
            "encoder",
            f"{name} with mask modes {offered}",
            f"mask mode {mode!r}",
            f"{method} needs mask mode {mode!r}; {name} offers {offered}",
        )


FAMILIES: dict[str, type[ViT] | type[BEiT]] = {"vit": ViT, "beit": BEiT}
STAGED: dict[str, type[Swin]] = {"swin": Swin, "swinv2": SwinV2, "mixswin": MixSwin}


def names() -> list[str]:
    """The names `build` knows: the constructors of the encoder classes, as "vit_b16"; "timm:<name>" works too."""
    own = [
        f"{family}_{name}"
        for family, kind in FAMILIES.items()
        for name, member in getmembers(kind, ismethod)
        if "patch" in signature(member).parameters
    ]
    return [*own, *(f"{family}_{name}" for family, kind in STAGED.items() for name in kind.sizes)]


def build(
    name: str,
    img_size: Size,
    patch: int | None = None,
    *,
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    drop_last: int = 0,
    **options: Any,
) -> Any:
    """An encoder by name.

    Args:
        name: a constructor, as "vit_b16", or "vit" for the defaults of the class; "timm:pvt_v2_b2" is timm's pvt_v2_b2.
        img_size: pixels, or (height, width).
        patch: overrides the constructor's patch in pixels.
        dim: overrides the width; `heads` then defaults to dim // 64.
        depth: overrides the number of blocks.
        heads: overrides the number of heads.
        drop_last: blocks left out at the end (FastMIM): they start from random weights when the encoder is fine-tuned.
        options: further arguments of the class, as positions="learned" of ViT.
    Raises:
        UserError: an unknown name, with the nearest ones; an unknown option; no block left.
    """
    op, known = "encoders.build", [*FAMILIES, *STAGED, *names()]
    given: dict[str, Any] = {"patch": patch, "dim": dim, "depth": depth, "heads": heads}
    if name.startswith("timm:") or (name in known and name.partition("_")[0] in STAGED):
        return _build_staged(name, img_size, given, drop_last, options)
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "no name is near it"
        fail(op, "name", repr(name), f"one of {', '.join(known)}", f"no encoder has this name; {hint}")
    family, _, size = name.partition("_")
    kind = FAMILIES[family]
    offered = signature(kind).parameters
    for option in options:
        if option not in offered:
            reason = f"{kind.__name__} has no other argument"
            fail(op, "an option", repr(option), f"one of {', '.join(offered)}", reason)
    if dim is not None and heads is None:
        given["heads"] = max(1, dim // 64)
    make = getattr(kind, size) if size else kind
    arguments = {key: found.default for key, found in signature(make).parameters.items() if key != "img_size"}
    arguments |= {key: value for key, value in given.items() if value is not None} | options
    if not 0 <= drop_last < max(arguments["depth"], 1):
        reason = f"{name} has {arguments['depth']} blocks and keeps at least one"
        fail(op, "drop_last", drop_last, f"0 to {arguments['depth'] - 1}", reason)
    return kind(img_size, **{**arguments, "depth": arguments["depth"] - drop_last})


def _build_staged(name: str, img_size: Size, given: dict[str, Any], drop_last: int, options: dict[str, Any]) -> Any:
    """An encoder whose sizes are lists, one entry for each stage: `options` of the class say more than one number."""
    op, timm = "encoders.build", name.startswith("timm:")
    for key, value in {**given, "drop_last": drop_last or None}.items():
        if value is not None and not (key == "drop_last" and not timm):
            because = f"{name} has stages of several widths and depths; give the arguments of its class"
            fail(op, key, value, None, because)
    if timm:
        return Timm(name.removeprefix("timm:"), img_size, **options)
    family, _, size = name.partition("_")
    kind = STAGED[family]
    arguments = {**(kind.sizes[size] if size else {}), **options}
    offered = signature(kind).parameters
    for option in arguments:
        if option not in offered:
            reason = f"{kind.__name__} has no other argument"
            fail(op, "an option", repr(option), f"one of {', '.join(offered)}", reason)
    depths = list(arguments.get("depths", offered["depths"].default))
    if not 0 <= drop_last < sum(depths):
        because = f"{name} has {sum(depths)} blocks and keeps at least one"
        fail(op, "drop_last", drop_last, f"0 to {sum(depths) - 1}", because)
    for i in reversed(range(len(depths))):  # the maps keep their sizes: merging stays where a stage loses its blocks
        gone = min(drop_last, depths[i])
        depths[i], drop_last = depths[i] - gone, drop_last - gone
    return kind(img_size, **{**arguments, "depths": depths})


def from_config(config: Mapping[str, Any]) -> Any:
    """The encoder that a `config` describes, with fresh weights; one without a "name" is a ViT's or a BEiT's."""
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    name = arguments.pop("name", "beit" if "relative" in config else "vit")
    if name.startswith("timm:"):
        return Timm(name.removeprefix("timm:"), **arguments)
    kinds: dict[str, Any] = {**FAMILIES, **STAGED}
    if name not in kinds:
        fail("encoders.from_config", "name", repr(name), f"one of {', '.join(kinds)}", "no encoder has this name")
    return kinds[name](**arguments)
