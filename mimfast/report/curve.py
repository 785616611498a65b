"""The loss curve, as a PNG drawn with Pillow and as SVG for the report."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _GRID, _RAW, _LINE = (255, 255, 255), (70, 74, 82), (226, 229, 233), (170, 196, 240), (37, 99, 235)


@dataclass(frozen=True)
class _Frame:
    """Where data coordinates lie in a picture of width x height."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float
    xs: list[float]
    ys: list[float]

    def x(self, value: float) -> float:
        return self.left + (value - self.xs[0]) / ((self.xs[-1] - self.xs[0]) or 1) * (
            self.width - self.left - self.right
        )

    def y(self, value: float) -> float:
        return (
            self.height
            - self.bottom
            - (value - self.ys[0]) / ((self.ys[-1] - self.ys[0]) or 1) * (self.height - self.top - self.bottom)
        )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover low..high, `about` of them, ascending."""
    span = high - low
    if not span > 0:
        span = abs(high) or 1.0
    raw = span / about
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving mean; the window shrinks towards both ends."""
    half = window // 2
    result = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        result.append(sum(part) / len(part))
    return result


def _lines(
    points: list[tuple[float, float]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[float], list[float]]:
    """(raw line, smoothed line, x ticks, y ticks) of the finite points."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    xs, ys = [x for x, _ in finite] or [0.0, 1.0], [y for _, y in finite] or [0.0, 1.0]
    soft = list(zip(xs, smooth(ys, max(1, len(ys) // 15)))) if finite else []
    # the steps of the axis begin at 0, and the last tick may lie beyond the last step only if the line would end at
    # the edge
    return finite, soft, ticks(0, max(xs), 5), ticks(min(ys), max(ys), 5)


def draw(points: list[tuple[float, float]], title: str, width: int = 960, height: int = 480) -> Image.Image:
    """A picture of loss over step; drawn twice as large and reduced, which smooths the lines."""
    raw, soft, xs, ys = _lines(points)
    f = _Frame(2 * width, 2 * height, 150, 100, 60, 120, xs, ys)
    image = Image.new("RGB", (2 * width, 2 * height), _PAPER)
    pen = ImageDraw.Draw(image)
    font, bold = ImageFont.load_default(28), ImageFont.load_default(32)
    for value in ys:
        pen.line((f.left, f.y(value), f.width - f.right, f.y(value)), _GRID, 2)
        pen.text((f.left - 16, f.y(value)), f"{value:g}", _INK, font=font, anchor="rm")
    pen.line((f.left, f.height - f.bottom, f.width - f.right, f.height - f.bottom), _INK, 2)
    for value in xs:
        pen.line((f.x(value), f.height - f.bottom, f.x(value), f.height - f.bottom + 10), _INK, 2)
        pen.text((f.x(value), f.height - f.bottom + 20), f"{value:g}", _INK, font=font, anchor="mt")
    for line, colour, thick in ((raw, _RAW, 3), (soft, _LINE, 6)):
        if len(line) > 1:
            pen.line([(f.x(x), f.y(y)) for x, y in line], colour, thick, joint="curve")
    pen.text((f.left, 40), title, _INK, font=bold, anchor="lm")
    pen.text(((f.left + f.width - f.right) / 2, f.height - 20), "step", _INK, font=font, anchor="ms")
    _sideways(image, "training loss", font, 34, (f.top + f.height - f.bottom) / 2)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _sideways(
    image: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, x: float, y: float
) -> None:
    left, top, right, bottom = font.getbbox(text)
    label = Image.new("RGB", (math.ceil(right - left) + 8, math.ceil(bottom - top) + 8), _PAPER)
    ImageDraw.Draw(label).text((4 - left, 4 - top), text, _INK, font=font)
    turned = label.rotate(90, expand=True)
    image.paste(turned, (round(x - turned.width / 2), round(y - turned.height / 2)))


def svg(points: list[tuple[float, float]], width: int = 860, height: int = 340) -> str:
    """The same curve as an SVG element; its colours are the classes grid, axis, raw and line of the page."""
    raw, soft, xs, ys = _lines(points)
    f = _Frame(width, height, 64, 12, 24, 52, xs, ys)
    base, end = f.height - f.bottom, f.width - f.right
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss over step">']
    for value in ys:
        y = f.y(value)
        parts.append(f'<line class="grid" x1="{f.left}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{f.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{f.left}" y1="{base}" x2="{end}" y2="{base}"/>')
    for value in xs:
        x = f.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{value:g}</text>')
    for line, name in ((raw, "raw"), (soft, "line")):
        if line:
            parts.append(
                f'<polyline class="{name}" points="{" ".join(f"{f.x(x):.1f},{f.y(y):.1f}" for x, y in line)}"/>'
            )
    middle = (f.top + base) / 2
    parts.append(f'<text x="{(f.left + end) / 2:.0f}" y="{height - 8}" text-anchor="middle">step</text>')
    parts.append(f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">training loss</text>')
    return "\n".join([*parts, "</svg>"])
