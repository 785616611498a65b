"""What methods share whose encoder returns every token: live image sizes, mask grids, checks of the parts."""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast import encoders
from mimfast._check import fail
from mimfast.encoders.inputs import Size
from mimfast.mask import Mask
from mimfast.ops._masks import Rounding
from mimfast.targets import Target


def sides(img_size: Size) -> tuple[int, int]:
    """(height, width) in pixels of a size given as one number or two."""
    return (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))


def encoder_for(encoder: Any, img: Tensor) -> Any:
    """The encoder for images of this size: itself, or with the same weights at another size."""
    size = (int(img.shape[-2]), int(img.shape[-1]))
    return encoder if size == sides(encoder.img_size) else encoder.at(size)


def draw(
    op: str,
    module: nn.Module,
    batch: int,
    img_size: Size,
    ratio: float,
    block: int,
    cell: int,
    rounding: Rounding,
    sample_ids: Tensor | None,
    seed: int,
    epoch: int | Tensor,
    device: torch.device | str | None,
) -> Mask:
    """Draw random blocks of `block` px over cells of `cell` px; the device defaults to that of the parameters."""
    height, width = sides(img_size)
    check_size(op, (height, width), block)
    device = next(module.parameters()).device if device is None else device
    return Mask.random(
        batch,
        (height // cell, width // cell),
        ratio,
        unit=block // cell,
        sample_ids=sample_ids,
        seed=seed,
        epoch=epoch,
        rounding=rounding,
        device=device,
    )


def check_size(op: str, size: tuple[int, int], block: int) -> None:
    """Raise unless an image is made of whole mask blocks."""
    for side in size:
        if side < block or side % block:
            reason = (
                f"it is masked in whole blocks of {block} px and {side} = {side // block} * {block} + {side % block}"
            )
            fail(op, "img_size", side, f"a multiple of {block}", reason)


def check_parts(op: str, encoder: Any, mode: str, decoder: Any, target: Target, ratio: float) -> None:
    """Raise when encoder, decoder and target do not fit together, or the ratio is none."""
    encoders.require_mode(op, encoder, mode)
    if decoder.encoder_dim != encoder.dim:
        reason = f"the encoder's tokens are {encoder.dim} wide"
        fail(op, "decoder", f"encoder_dim {decoder.encoder_dim}", encoder.dim, reason)
    if target.patch != encoder.stride:
        reason = f"a token of the encoder covers {encoder.stride} px"
        fail(op, "target", f"patch {target.patch}", f"patch {encoder.stride}", reason)
    if target.dim != decoder.out_dim:
        reason = f"the decoder predicts {decoder.out_dim} values per token"
        fail(op, "target", f"dim {target.dim}", decoder.out_dim, reason)
    if not 0 <= ratio < 1:
        fail(op, "ratio", ratio, "a number in [0, 1)", "it is the share of hidden blocks and one must stay visible")


def first_of(values: Any, count: int) -> Any:
    """The first `count` of (B,) values; None and plain numbers stay."""
    return values[:count] if isinstance(values, Tensor) and values.ndim else values
