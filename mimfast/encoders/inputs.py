"""What encoders with one token per patch ask of sizes, images and masks."""

import torch
from torch import Tensor

from mimfast._check import check_same_device, fail
from mimfast.mask import Mask

Size = int | tuple[int, int]


def sizes(op: str, img_size: Size, patch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) in pixels and (rows, columns) in patches; raises unless the patches tile the image."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    if patch < 1:
        fail(op, "patch", patch, "a positive number of pixels", "a patch holds at least one pixel")
    for size in (height, width):
        if size < patch or size % patch:
            reason = (
                f"it is cut into whole patches of {patch} px and {size} = {size // patch} * {patch} + {size % patch}"
            )
            fail(op, "img_size", size, f"a multiple of {patch}", reason)
    return (height, width), (height // patch, width // patch)


def check_image(op: str, img: Tensor, img_size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Raise unless `img` is a batch of 3-channel images of that size, in uint8 or floating point."""
    (height, width), (rows, columns) = img_size, grid
    if img.ndim != 4 or img.shape[1] != 3:
        wanted, reason = f"(batch, 3, {height}, {width})", "it takes batches of 3-channel images"
        fail(op, "img", f"shape {tuple(img.shape)}", wanted, reason)
    if img.shape[2] != height or img.shape[3] != width:
        reason = f"this encoder has positions for {rows}x{columns} patches of {height // rows} px"
        fail(op, "img", f"size {img.shape[2]}x{img.shape[3]}", f"{height}x{width}", reason)
    if img.dtype != torch.uint8 and not img.is_floating_point():
        reason = "uint8 means 0..255 and floats are normalised"
        fail(op, "img", f"dtype {str(img.dtype)[6:]}", "uint8 or floating point", reason)


def check_mask(op: str, mask: Mask, grid: tuple[int, int], tensor: Tensor) -> None:
    """Raise unless `mask` is over `grid` and goes with the batch and the device of `tensor`."""
    if mask.grid != grid:
        rows, columns = grid
        found, wanted = f"grid {mask.grid[0]}x{mask.grid[1]}", f"{rows}x{columns}"
        fail(op, "mask", found, wanted, f"the model has {rows}x{columns} tokens")
    if mask.hidden.shape[0] != tensor.shape[0]:
        fail(op, "mask", f"batch {mask.hidden.shape[0]}", tensor.shape[0], f"the batch holds {tensor.shape[0]} images")
    check_same_device(op, img=tensor, mask=mask.keep)
