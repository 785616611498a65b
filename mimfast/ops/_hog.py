"""The rule of hog and hog_loss: its constants, its checks, and what the kernels get of it. See mimfast/ops/hog.py."""

import math
from typing import Literal

import torch
from torch import Tensor

from mimfast._check import check_dtype, check_shape, fail
from mimfast._images import Triple

COMPATS = ("integer", "float")
Compat = Literal["integer", "float"]
TANGENTS = tuple(math.tan(math.radians(20 * k)) for k in range(1, 5))
LARGEST = 1141  # no 3 x 3 pixels of 0..255 give a magnitude above sqrt(1020^2 + 510^2)
MAX_WINDOW = 32


def gaussian(window: int) -> list[float]:
    """One side of the window: the weight of pixel (y, x) is the product of entries y and x (mod window)."""
    shape = [math.exp(-0.5 * ((n - (window - 1) / 2) / (window // 2)) ** 2) for n in range(window)]
    return [v / sum(shape) for v in shape]


def fixed_point(cell: int, window: int) -> tuple[float, list[float]]:
    """(steps of the integer sums for one unit of magnitude, one side of the window scaled by the root of them).

    The largest power of two (of four, with a window) for which no sum of a cell exceeds 31 bits.
    """
    side = gaussian(window)
    heaviest = max(sum(side[(j * cell + x) % window] for x in range(cell)) for j in range(window)) if window else cell
    bits = math.floor(math.log2((2**31 - 1) / (LARGEST * heaviest**2)))
    bits = bits // 2 * 2 if window else bits
    return 2.0**bits, [v * 2.0 ** (bits // 2) for v in side]


def rule(cell: int, window: int, std: list[float]) -> tuple[float, list[float], list[float]]:
    """What the kernels need beside the images: unit, weights, and the factor of raw sums per colour."""
    unit, weights = fixed_point(cell, window)
    return unit, weights, [1 / (255 * s * unit) for s in std]


def native_images(core, img: Tensor, cell: int, normalize: bool, window: int, std: list[float]):
    """The HogImages of csrc/hog.h: what the native kernels read and by which rule."""
    unit, weights, factor = rule(cell, window, std)
    return core.HogImages(
        img=img.data_ptr(), stride=img.stride(), batch=len(img), height=img.shape[2], width=img.shape[3], cell=cell,
        unit=unit, weight=weights, normalize=normalize, factor=factor,
    )  # fmt: skip


def check_rule(op: str, img: Tensor, cell: int, bins: int, window: int, compat: str, std: Triple) -> None:
    """Raise unless images and rule fit, in the name of `op`."""
    if compat not in COMPATS:
        fail(op, "compat", repr(compat), " or ".join(map(repr, COMPATS)), "no other arithmetic is defined")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if compat == "integer":
        because = "its gradients are exact integers; compat='float' takes floating point"
        check_dtype(op, "img", img, (torch.uint8,), because)
    check_dtype(op, "img", img, (torch.uint8, *floats), "it holds pixels")
    check_shape(op, "img", img, (None, 3, None, None), "an image batch is (B, 3, H, W)")
    H, W = img.shape[2:]
    if cell < 2:
        fail(op, "cell", cell, "2 or more", "it is the side of a cell in pixels, and a border is mirrored")
    if H % cell or W % cell or not H * W:
        because = f"cells are {cell} x {cell} pixels and none may be cut"
        fail(op, "img", f"{H} x {W} pixels", f"multiples of {cell}", because)
    if bins < 1 or (bins != 9 and compat == "integer"):
        because = "the half-plane tests of the integer rule are those of 9 bins; compat='float' takes any number"
        fail(op, "bins", bins, "9" if compat == "integer" else "1 or more", because)
    if window and (not 2 <= window <= MAX_WINDOW or H % window or W % window):
        because = f"the window is tiled over {H} x {W} pixels and held in registers"
        fail(op, "gaussian_window", window, f"0, or a divisor of the sides from 2 to {MAX_WINDOW}", because)
    if not min(std) > 0:
        fail(op, "std", tuple(std), "three numbers above 0", "pixels are divided by them")


def check_stride(op: str, img: Tensor, cell: int, stride: int, name: str = "stride") -> None:
    """Raise unless tokens of `stride` pixels are whole cells and tile the image."""
    H, W = img.shape[2:]
    if stride < cell or stride % cell:
        fail(op, name, stride, f"a multiple of {cell}", f"a token is made of whole cells of {cell} pixels")
    if H % stride or W % stride:
        because = f"tokens are {stride} x {stride} pixels and none may be cut"
        fail(op, "img", f"{H} x {W} pixels", f"multiples of {stride}", because)
