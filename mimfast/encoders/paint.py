"""Painting: every pixel of a hidden mask cell becomes one learned colour, and then any backbone can run.

FastMIM, arXiv:2212.06593.   B batch, H W pixels, n pixels per side of a mask cell
"""

import torch
from torch import Tensor

from mimfast._check import check_same_device, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.mask import Mask

OP = "paint"


def paint(
    img: Tensor, mask: Mask, colour: Tensor | None, *, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
) -> Tensor:
    """Normalise the images and paint their hidden cells over; `colour` gets the summed gradient of its pixels.

    Args:
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides.
        mask: over any grid whose cells are whole square pixels of the image.
        colour: (1, 3, 1, 1) floating point, in normalised colour space.
        mean: per channel, of values in 0..1; for uint8 images.
        std: per channel, of values in 0..1; for uint8 images.
    Returns:
        (B, 3, H, W), float32 for uint8 images and the dtype of `img` for others.
    Raises:
        UserError: images, a mask or a colour of another shape, dtype, batch or device; cells that are not whole pixels.
    """
    n = cell_of(img, mask)
    colour = checked_colour(OP, colour, img)
    (rows, columns), B = mask.grid, img.shape[0]
    x_B3HW = normalize(img, mean, std)
    cells = x_B3HW.reshape(B, 3, rows, n, columns, n)
    hidden = mask.hidden.view(B, 1, rows, 1, columns, 1)
    return torch.where(hidden, colour.to(cells.dtype).view(1, 3, 1, 1, 1, 1), cells).reshape(x_B3HW.shape)


def cell_of(img: Tensor, mask: Mask, op: str = OP) -> int:
    """Pixels per side of a mask cell.

    Args:
        img: (B, 3, H, W), uint8 or floating point.
        mask: of the same batch, on the same device.
        op: the name that a message begins with.
    Raises:
        UserError: another shape, dtype, batch or device, or cells that are not whole square pixels of the image.
    """
    check_image(op, img)
    if mask.hidden.shape[0] != img.shape[0]:
        because = f"the batch holds {img.shape[0]} images"
        fail(op, "mask", f"batch {mask.hidden.shape[0]}", img.shape[0], because)
    check_same_device(op, img=img, mask=mask.hidden)
    (height, width), (rows, columns) = img.shape[2:], mask.grid
    if mask.frames != 1 or height % rows or width % columns or height // rows != width // columns:
        found = f"grid {rows}x{columns}" + (f" with {mask.frames} frames" if mask.frames != 1 else "")
        because = f"the image of {height}x{width} px is cut into square cells of whole pixels, {height} / {rows} a side"
        fail(op, "mask", found, "a grid that divides the image", because)
    return height // rows


def check_image(op: str, img: Tensor) -> None:
    """Raise unless `img` is a batch of 3-channel images in uint8 or floating point."""
    if img.ndim != 4 or img.shape[1] != 3:
        because = "it takes batches of 3-channel images"
        fail(op, "img", f"shape {tuple(img.shape)}", "(batch, 3, height, width)", because)
    if img.dtype != torch.uint8 and not img.is_floating_point():
        because = "uint8 means 0..255 and floats are normalised"
        fail(op, "img", f"dtype {str(img.dtype)[6:]}", "uint8 or floating point", because)


def checked_colour(op: str, colour: Tensor | None, img: Tensor) -> Tensor:
    """`colour`; raises unless it is one, on the device of `img`."""
    if colour is None:
        fail(op, "colour", None, "a tensor (1, 3, 1, 1)", "mode 'paint' paints hidden pixels in that colour")
    if tuple(colour.shape) != (1, 3, 1, 1) or not colour.is_floating_point():
        found = f"shape {tuple(colour.shape)}, dtype {str(colour.dtype)[6:]}"
        fail(op, "colour", found, "(1, 3, 1, 1) floating point", "it is one colour in normalised colour space")
    check_same_device(op, img=img, colour=colour)
    return colour
