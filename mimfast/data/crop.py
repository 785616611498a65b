"""Which part of an image the model sees, and its resampling to a square.

The random box follows the Inception crop that image pre-training uses (Szegedy et al., arXiv 1409.4842, section 6; the
attempts and the fallback as in the common PyTorch transform): an area share uniform in `scale`, an aspect ratio uniform
in log `ratio`, ten attempts to fit, else the largest centred box inside the ratio bounds. All of it is a pure function
of (seed, epoch, sample id) and the size of the image, from the words of Philox's STREAM_CROP:
words 2a and 2a+1 are area and ratio of attempt a, words 20 and 21 the place, word 22 the flip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mimfast import _native, philox
from mimfast._check import fail
from mimfast.ops.crop_resize import FILTERS, Filter, crop_resize

_ATTEMPTS = 10
_WORDS = 2 * _ATTEMPTS + 3
_EVERY_BYTE = (1 << 63) - 1


@dataclass(frozen=True)
class CropConfig:
    """scale: share of the area, (0.2, 1.0) for MAE. ratio: width / height. flip: mirror half of the samples.
    filter: of the resampling, both with antialias.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            fail("crop", "scale", self.scale, "0 < low <= high <= 1", "it is a share of the area of the image")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            fail("crop", "ratio", self.ratio, "0 < low <= high", "it is width divided by height")
        if self.filter not in FILTERS:
            fail("crop", "filter", repr(self.filter), " or ".join(map(repr, FILTERS)), "a crop is resampled with it")


class Box(NamedTuple):
    left: int
    top: int
    width: int
    height: int


def crop_words(seed: int, epochs: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """(B, 23) int64 words that decide crop and flip. epochs, sample_ids: int64 (B,)."""
    return philox.words(seed, philox.STREAM_CROP, epochs, sample_ids, _WORDS)


def crop_boxes(
    words: np.ndarray, widths: np.ndarray, heights: np.ndarray, config: CropConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and flips for images of these sizes.

    words: (B, 23) of `crop_words`. widths, heights: integers (B,).
    Returns int32 (B, 4), top, left, height, width as ops.crop_resize takes them, and bool (B,).
    """
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    width, height = widths.astype(np.int64), heights.astype(np.int64)
    area = (width * height)[:, None] * _between(words[:, 0 : 2 * _ATTEMPTS : 2], *config.scale)
    ratio = np.exp(_between(words[:, 1 : 2 * _ATTEMPTS : 2], low, high))
    wide, tall = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide > 0) & (wide <= width[:, None]) & (tall > 0) & (tall <= height[:, None])
    first, row = fits.argmax(1), np.arange(len(words))
    box_width, box_height = wide[row, first].astype(np.int64), tall[row, first].astype(np.int64)
    left, top = _below(words[:, -3], width - box_width + 1), _below(words[:, -2], height - box_height + 1)
    if not fits.any(1).all():
        none = ~fits.any(1)
        largest = np.minimum(width, np.maximum(1, np.rint(height * config.ratio[1]).astype(np.int64)))
        box_width = np.where(none, largest, box_width)
        largest = np.minimum(height, np.maximum(1, np.rint(width / config.ratio[0]).astype(np.int64)))
        box_height = np.where(none, largest, box_height)
        left, top = np.where(none, (width - box_width) // 2, left), np.where(none, (height - box_height) // 2, top)
    flip = words[:, -1] < (1 << 31 if config.flip else 0)
    return np.stack([top, left, box_height, box_width], 1).astype(np.int32), flip


def centre_box(width: int, height: int) -> Box:
    """The largest centred square: short side resized, then the centre cut, in one step."""
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)


def crop_rows(
    images: Sequence[np.ndarray], boxes: np.ndarray, flip: np.ndarray, filter: Filter, out: np.ndarray
) -> None:
    """ops.crop_resize of images that lie anywhere in memory, on the thread of the caller.

    images: n arrays, uint8 (H, W, 3). boxes: int32 (n, 4), flip: bool (n,), as `crop_boxes` gives them.
    out: uint8 (n, 3, S, S), contiguous; written.
    """
    core = _native.core()
    images = [np.ascontiguousarray(image) for image in images]
    if core is None:
        for row, image in enumerate(images):
            box, mirror = torch.from_numpy(boxes[row : row + 1]), torch.from_numpy(flip[row : row + 1])
            img, there = torch.from_numpy(image[None].copy()), torch.from_numpy(out[row : row + 1])
            crop_resize(img, box, mirror, out.shape[-1], filter=filter, out=there, impl="ref")
        return
    # the offset of an image in the memory of the process is its address
    offsets = np.array([image.__array_interface__["data"][0] for image in images], np.int64)
    shapes = np.array([image.shape[:2] for image in images], np.int32)
    boxes, flip = np.ascontiguousarray(boxes), np.ascontiguousarray(flip)
    call = core.CropResize(
        img=0, stride=(0, 0, 0, 0), height=0, width=0, bytes=_EVERY_BYTE, offsets=offsets.ctypes.data,
        shapes=shapes.ctypes.data, batch=len(images), boxes=boxes.ctypes.data, flip=flip.ctypes.data,
        size=out.shape[-1], bicubic=filter == "bicubic", out=out.ctypes.data,
    )  # fmt: skip
    core.crop_resize_cpu(call, 1)


def min_decoded_side(size: int, config: CropConfig | None) -> int:
    """Sides a JPEG must keep when decoded at reduced size, so that a crop is not magnified because of it.

    The square crop of the smallest area has side sqrt(scale) of the short side; config None stands for the centre crop.
    """
    return size if config is None else math.ceil(size / math.sqrt(config.scale[0]))


def _between(word: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * ((word + 0.5) * 2.0**-32)


def _below(word: np.ndarray, n: np.ndarray) -> np.ndarray:
    return (word * n) >> 32
