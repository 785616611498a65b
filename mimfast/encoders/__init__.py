"""Encoders: one class per file, each usable as a plain backbone and with a mask."""

from difflib import get_close_matches
from inspect import getmembers, ismethod, signature
from typing import Any, Protocol

from torch import Tensor

from mimfast._check import fail
from mimfast.encoders.embed import PatchEmbedVisible as PatchEmbedVisible
from mimfast.encoders.vit import Size
from mimfast.encoders.vit import ViT as ViT
from mimfast.mask import Mask

__all__ = ["Encoder", "PatchEmbedVisible", "ViT", "build", "names", "require_mode"]


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


def names() -> list[str]:
    """The names `build` knows: the constructors of the encoder classes, as "vit_b16"."""
    sizes = [name for name, member in getmembers(ViT, ismethod) if "patch" in signature(member).parameters]
    return [f"vit_{name}" for name in sizes]


def build(
    name: str,
    img_size: Size,
    patch: int | None = None,
    *,
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> ViT:
    """An encoder by name.

    Args:
        name: a constructor, as "vit_b16", or "vit" for the defaults of the class.
        img_size: pixels, or (height, width).
        patch: overrides the constructor's patch in pixels.
        dim: overrides the width; `heads` then defaults to dim // 64.
        depth: overrides the number of blocks.
        heads: overrides the number of heads.
    Raises:
        UserError: an unknown name, with the nearest ones.
    """
    known = names()
    if name != "vit" and name not in known:
        close = get_close_matches(name, ["vit", *known], n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else "no name is near it"
        fail(
            "encoders.build",
            "name",
            repr(name),
            f"one of {', '.join(['vit', *known])}",
            f"no encoder has this name; {hint}",
        )
    if dim is not None and heads is None:
        heads = max(1, dim // 64)
    given: dict[str, Any] = {"patch": patch, "dim": dim, "depth": depth, "heads": heads}
    make = ViT if name == "vit" else getattr(ViT, name.removeprefix("vit_"))
    return make(img_size, **{key: value for key, value in given.items() if value is not None})
