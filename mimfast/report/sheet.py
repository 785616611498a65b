"""Sheets of pictures in columns: original, what the encoder saw, and the prediction, side by side."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimfast.report.glyphs import stars

HEADINGS = ("original", "seen by the encoder", "prediction")
HOG_HEADINGS = ("original", "seen by the encoder", "edges of the original", "edges predicted")
_PAPER, _INK, _HIDDEN = (255, 255, 255), (70, 74, 82), (206, 210, 216)
# strokes where the encoder was blind, and where it saw
_BLIND, _SEEN = (20, 60, 160), (150, 154, 162)


def draw(original: Tensor, pasted: Tensor, hidden: Tensor, cell: int = 192, groups: int = 2) -> Image.Image:
    """Draw the sheet of a pixel target.

    Args:
        original: (n, 3, H, W) in [0, 1].
        pasted: the same, hidden patches replaced by the prediction.
        hidden: (n, rows, columns) bool, True = hidden from the encoder.
        cell: least side of one picture on the sheet in pixels; small pictures are enlarged by a whole factor.
        groups: samples beside each other.
    """
    factor = max(1, math.ceil(cell / max(original.shape[2:])))
    samples = []
    for picture, prediction, blind in zip(original, pasted, hidden):
        seen = _enlarge(picture, factor)
        _cover(seen, blind.numpy(), _HIDDEN)
        samples.append((_enlarge(picture, factor), seen, _enlarge(prediction, factor)))
    return _arrange(samples, HEADINGS, groups)


def draw_hog(
    original: Tensor,
    hidden: Tensor,
    target: Tensor,
    predicted: Tensor,
    paint: tuple[int, int, int] | None = None,
    cell: int = 192,
    groups: int = 2,
) -> Image.Image:
    """Draw the sheet of a HOG target: histograms as stars, see `glyphs.stars`.

    Args:
        original: (n, 3, H, W) uint8.
        hidden: (n, rows, columns) bool, True = hidden from the encoder.
        target: (n, 27, R, C), the histograms of the original; drawn relative to their largest value.
        predicted: (n, 27, R, C); visible cells show the target.
        paint: RGB colour of hidden blocks; None: grey.
        cell: least side of one picture on the sheet in pixels; small pictures are enlarged by a whole factor.
        groups: samples beside each other.
    """
    factor = max(1, math.ceil(cell / max(original.shape[2:])))
    side = original.shape[2] // target.shape[2] * factor
    samples = []
    for picture, blind, real, guess in zip(original.float() / 255, hidden, target, predicted):
        seen = _enlarge(picture, factor)
        _cover(seen, blind.numpy(), _HIDDEN if paint is None else paint)
        times = target.shape[2] // hidden.shape[1]
        blind_RC = blind.repeat_interleave(times, 0).repeat_interleave(times, 1)
        scale = max(float(real.max()), 1e-12)
        drawn = [_glyphs(values / scale, blind_RC, side) for values in (real, guess.where(blind_RC, real))]
        samples.append((_enlarge(picture, factor), seen, *drawn))
    height, width = original.shape[2] // target.shape[2], original.shape[3] // target.shape[3]
    note = (
        f"A star shows the edges in a cell of {width} x {height} pixels: the longer and darker a stroke, the more of "
        "them run along it. Blue cells were hidden from the encoder, grey ones it saw."
    )
    return _arrange(samples, HOG_HEADINGS, groups, note)


def _arrange(
    samples: Sequence[tuple[Image.Image, ...]], headings: Sequence[str], groups: int, note: str = ""
) -> Image.Image:
    """The pictures of each sample in a row under their headings, `groups` samples beside each other, a note below."""
    cell_w, cell_h = samples[0][0].size
    n, columns = len(samples), len(headings)
    groups = min(groups, n)
    rows = math.ceil(n / groups)
    gap, apart, margin = max(4, cell_w // 32), cell_w // 6, cell_w // 10
    letter = max(12, cell_w // 11)
    small = letter * 4 // 5
    font, fine = ImageFont.load_default(letter), ImageFont.load_default(small)
    top = margin + 2 * letter
    group_w = columns * cell_w + (columns - 1) * gap
    inner = groups * group_w + (groups - 1) * apart
    lines = _wrap(note, fine, inner)
    bottom = top + rows * (cell_h + gap) - gap + margin
    height = bottom + (len(lines) * small * 3 // 2 + margin if lines else 0)
    sheet = Image.new("RGB", (2 * margin + inner, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, pictures in enumerate(samples):
        left, y = margin + (i % groups) * (group_w + apart), top + (i // groups) * (cell_h + gap)
        for j, picture in enumerate(pictures):
            x = left + j * (cell_w + gap)
            sheet.paste(picture, (x, y))
            if i < groups:
                pen.text((x + cell_w / 2, top - letter * 0.6), headings[j], _INK, font=font, anchor="ms")
    for i, line in enumerate(lines):
        pen.text((margin, bottom + i * small * 3 // 2), line, _INK, font=fine, anchor="la")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _enlarge(picture: Tensor, factor: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _glyphs(hog: Tensor, blind: Tensor, side: int) -> Image.Image:
    """Stars of `side` px in the colour of hidden (blind) and of visible cells, on paper."""
    ink_HW1 = stars(hog, side).numpy()[..., None]
    blind_HW1 = blind.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy()[..., None]
    colour_HW3 = np.where(blind_HW1, np.array(_BLIND), np.array(_SEEN))
    pixels = np.array(_PAPER) * (1 - ink_HW1) + colour_HW3 * ink_HW1
    return Image.fromarray(pixels.round().astype(np.uint8))


def _cover(image: Image.Image, hidden: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Paint hidden patches over, after enlarging, so that their edges stay sharp."""
    rows, columns = hidden.shape
    height, width = image.height // rows, image.width // columns
    pen = ImageDraw.Draw(image)
    for row, column in zip(*np.nonzero(hidden)):
        x, y = int(column) * width, int(row) * height
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
