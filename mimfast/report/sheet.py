"""The reconstruction sheet: original, what the encoder saw, and the prediction, side by side."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HEADINGS = ("original", "seen by the encoder", "prediction")
_PAPER, _INK, _HIDDEN = (255, 255, 255), (70, 74, 82), (206, 210, 216)


def draw(original: Tensor, pasted: Tensor, hidden: Tensor, cell: int = 192, groups: int = 2) -> Image.Image:
    """Draw the sheet.

    Args:
        original: (n, 3, H, W) in [0, 1].
        pasted: the same, hidden patches replaced by the prediction.
        hidden: (n, rows, columns) bool, True = hidden from the encoder.
        cell: least side of one picture on the sheet in pixels; small pictures are enlarged by a whole factor.
        groups: samples beside each other.
    """
    n, height, width = len(original), original.shape[2], original.shape[3]
    factor = max(1, math.ceil(cell / max(height, width)))
    cell_w, cell_h = width * factor, height * factor
    groups = min(groups, n)
    rows = math.ceil(n / groups)
    gap, apart, margin = max(4, cell_w // 32), cell_w // 6, cell_w // 10
    letter = max(12, cell_w // 11)
    font = ImageFont.load_default(letter)
    top = margin + 2 * letter
    group_w = 3 * cell_w + 2 * gap
    sheet = Image.new(
        "RGB",
        (2 * margin + groups * group_w + (groups - 1) * apart, top + rows * (cell_h + gap) - gap + margin),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for i in range(n):
        left, y = margin + (i % groups) * (group_w + apart), top + (i // groups) * (cell_h + gap)
        seen = _enlarge(original[i], factor)
        _cover(seen, hidden[i].numpy())
        for j, picture in enumerate((_enlarge(original[i], factor), seen, _enlarge(pasted[i], factor))):
            x = left + j * (cell_w + gap)
            sheet.paste(picture, (x, y))
            if i < groups:
                pen.text((x + cell_w / 2, top - letter * 0.6), HEADINGS[j], _INK, font=font, anchor="ms")
    return sheet


def _enlarge(picture: Tensor, factor: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _cover(image: Image.Image, hidden: np.ndarray) -> None:
    """Paint hidden patches over, after enlarging, so that their edges stay sharp."""
    rows, columns = hidden.shape
    height, width = image.height // rows, image.width // columns
    pen = ImageDraw.Draw(image)
    for row, column in zip(*np.nonzero(hidden)):
        x, y = int(column) * width, int(row) * height
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=_HIDDEN)
