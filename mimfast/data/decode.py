"""Bytes of an image file -> RGB pixels, or BadImage with the reason. Safe to call from many threads.

What becomes of unusual images:
- transparency is composited onto white, as a browser shows it;
- 16-bit and 32-bit grayscale is scaled to 8 bits (never clipped); floating-point pixels are accepted in 0..1 only;
- CMYK, YCCK, palette, grayscale and 1-bit become RGB; animations and multi-page files give their first frame;
- the EXIF orientation is applied, a damaged EXIF block is ignored;
- more than MAX_PIXELS pixels, and anything cut short, is refused: no part of an image is ever made up.
"""

import io
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image

# Held against the size in the header, before any pixel is decoded: a few bytes of file can claim gigabytes of memory.
MAX_PIXELS = 1 << 27

# Only codecs that decode in process; Pillow would start Ghostscript for PostScript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW = r"PIL\."
_setup_lock = threading.Lock()
_formats: list[str] = []


class BadImage(Exception):
    """This image cannot be used; `reason` is a short phrase without the name of the file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    """uint8 (H, W, 3) pixels, RGB, upright.

    data: a whole image file. min_side: when given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as
    both sides keep at least this many pixels. Raises BadImage.
    """
    return np.asarray(decode_image(data, min_side))


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """The same as a loaded Pillow image of mode RGB, which no longer refers to `data`."""
    if not data:
        raise BadImage("the file is empty")
    _set_up()
    try:
        with Image.open(io.BytesIO(data), formats=_formats) as image:
            return _rgb(image, min_side)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or in a format that the installed Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise BadImage(f"the header claims more than the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, KeyError, ... on damage
        raise BadImage(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None


def reduced_shapes(shapes: np.ndarray, min_side: int | None) -> np.ndarray:
    """Heights and widths that `decode(jpeg, min_side)` gives for JPEG files of these: int32 (N, 2) to int32 (N, 2)."""
    if min_side is None:
        return shapes
    whole = shapes.min(1) // min_side
    scale = np.select([whole >= 8, whole >= 4, whole >= 2], [8, 4, 2], 1)[:, None]
    return ((shapes + scale - 1) // scale).astype(np.int32)


def _set_up() -> None:
    """Load Pillow's codecs once; keep its remarks about odd files off the terminal (the loader reports bad files)."""
    if _PILLOW not in (getattr(rule[3], "pattern", None) for rule in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)
    if not _formats:
        with _setup_lock:
            Image.init()
            _formats[:] = [name for name in _FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, min_side: int | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} is more than the limit of {MAX_PIXELS} pixels")
    if width < 1 or height < 1:
        raise BadImage(f"{width}x{height} has no pixels")
    if min_side is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (min_side, min_side))
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_gray_to_8_bit(image)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode == "RGB":
        return image.copy()
    return image.convert("RGB")


def _gray_to_8_bit(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 from mode I;16, I (16 or 32 bits, told apart by the largest value) or F."""
    pixels: np.ndarray[Any, Any] = np.asarray(image)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise BadImage(f"floating-point pixels from {low:g} to {high:g}, expected 0 to 1")
        return np.rint(pixels * 255).astype(np.uint8)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0:
        raise BadImage(f"negative pixels, down to {low}")
    top = 65535 if image.mode != "I" or high <= 65535 else 2**31 - 1
    return np.rint(pixels * (255 / top)).astype(np.uint8)
