"""Which part of an image the model sees, and its resampling to a square.

The random box follows the Inception crop that image pre-training uses (Szegedy et al., arXiv 1409.4842, section 6; the
attempts and the fallback as in the common PyTorch transform): an area share uniform in `scale`, an aspect ratio uniform
in log `ratio`, ten attempts to fit, else the largest centred box inside the ratio bounds. All of it is a pure function
of (seed, epoch, sample id) and the size of the image, from the words of Philox's STREAM_CROP:
words 2a and 2a+1 are area and ratio of attempt a, words 20 and 21 the place, word 22 the flip.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from mimfast import philox
from mimfast._check import fail

_ATTEMPTS = 10
_WORDS = 2 * _ATTEMPTS + 3
# When shrinking 2 * 3 times or more, Pillow first averages whole blocks of pixels and filters what remains, at least 3
# times the size asked for: several times faster on large photographs and hardly different from the full filter.
_REDUCING_GAP = 3.0
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Filter = Literal["bicubic", "bilinear"]


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
        if self.filter not in _FILTERS:
            fail("crop", "filter", repr(self.filter), " or ".join(map(repr, _FILTERS)), "a crop is resampled with it")


class Box(NamedTuple):
    left: int
    top: int
    width: int
    height: int


def crop_words(seed: int, epochs: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """(B, 23) int64 words that decide crop and flip. epochs, sample_ids: int64 (B,)."""
    return philox.words(seed, philox.STREAM_CROP, epochs, sample_ids, _WORDS)


def crop_box(words: np.ndarray, width: int, height: int, config: CropConfig) -> tuple[Box, bool]:
    """Box in pixels and flip for an image of this size. words: one row of `crop_words`."""
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    w = words.tolist()
    for attempt in range(_ATTEMPTS):
        area = width * height * _between(w[2 * attempt], *config.scale)
        ratio = math.exp(_between(w[2 * attempt + 1], low, high))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = _below(w[20], width - box_width + 1), _below(w[21], height - box_height + 1)
            break
    else:
        box_width = min(width, max(1, round(height * config.ratio[1])))
        box_height = min(height, max(1, round(width / config.ratio[0])))
        left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left, top, box_width, box_height), config.flip and w[22] < 1 << 31


def centre_box(width: int, height: int) -> Box:
    """The largest centred square: short side resized, then the centre cut, in one step."""
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)


def resample(image: Image.Image, box: Box, size: int, flip: bool, out: np.ndarray, filter: Filter = "bicubic") -> None:
    """Resample with antialias from `box` of an RGB image into out, uint8 (3, size, size)."""
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    if (box.width, box.height) == (size, size):
        square = image.crop(edges)
    else:
        square = image.resize((size, size), _FILTERS[filter], box=edges, reducing_gap=_REDUCING_GAP)
    pixels = np.asarray(square)
    out[...] = (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


def min_decoded_side(size: int, config: CropConfig | None) -> int:
    """Sides a JPEG must keep when decoded at reduced size, so that a crop is not magnified because of it.

    The square crop of the smallest area has side sqrt(scale) of the short side; config None stands for the centre crop.
    """
    return size if config is None else math.ceil(size / math.sqrt(config.scale[0]))


def _between(word: int, low: float, high: float) -> float:
    return low + (high - low) * ((word + 0.5) * 2.0**-32)


def _below(word: int, n: int) -> int:
    return (word * n) >> 32
