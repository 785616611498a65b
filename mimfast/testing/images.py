"""Odd image files as people really have them, made in memory: nothing is downloaded or stored in the repository.

`odd_images()` gives each file with what must become of it. The picture is four flat quadrants, so that what a decoder
returns can be held against the pixels it should return whatever the codec loses.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

WIDTH, HEIGHT = 64, 48
_COLOURS = ((200, 40, 40), (40, 160, 60), (50, 60, 200), (220, 200, 60))


class OddImage(NamedTuple):
    """pixels: uint8 (H, W, 3) that decoding must give, to a mean absolute error of `tolerance`; None when the file must
    be refused with a reason that contains `reason`."""

    name: str
    data: bytes
    pixels: np.ndarray | None
    reason: str = ""
    tolerance: float = 0.0


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """uint8 (height, width, 3): red, green / blue, yellow."""
    pixels = np.empty((height, width, 3), np.uint8)
    middle = (height // 2, width // 2)
    pixels[: middle[0], : middle[1]], pixels[: middle[0], middle[1] :] = _COLOURS[:2]
    pixels[middle[0] :, : middle[1]], pixels[middle[0] :, middle[1] :] = _COLOURS[2:]
    return pixels


def noise(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3) of random pixels: nearly all of the file is image data, wherever it is cut."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3) with detail of all sizes, as in a photograph, which codecs keep."""
    pixels = np.zeros((height, width, 3), np.float32)
    for side in (3, 8, 24, 80):
        rough = Image.fromarray(noise(side, side, seed * 7 + side))
        pixels += np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 4
    return pixels.astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """An image file of a Pillow format name."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_images() -> list[OddImage]:
    """Every case; file names end the way users name them, also when the content is something else."""
    return [*_jpegs(), *_oriented(), *_deep(), *_transparent(), *_animated(), *_sizes(), *_other_formats(), *_refused()]


def write_folder(folder: Path) -> tuple[int, int]:
    """Write every case below `folder`; returns the number of files that must load and of those that must be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = odd_images()
    for case in cases:
        (folder / case.name).write_bytes(case.data)
    good = sum(case.pixels is not None for case in cases)
    return good, len(cases) - good


def _gray(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, -1)


def _jpegs() -> list[OddImage]:
    rgb = picture()
    plain = encode(rgb, "JPEG", quality=95)
    gray = _gray(rgb)
    return [
        OddImage("plain.jpg", plain, rgb, tolerance=4),
        OddImage("UPPER.JPEG", plain, rgb, tolerance=4),
        OddImage("progressive.jpg", encode(rgb, "JPEG", quality=95, progressive=True), rgb, tolerance=4),
        OddImage("full_chroma.jpg", encode(rgb, "JPEG", quality=95, subsampling="4:4:4"), rgb, tolerance=4),
        OddImage("gray.jpg", encode(gray, "JPEG", quality=95), _as_rgb(gray), tolerance=4),
        OddImage("cmyk.jpg", encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), rgb, tolerance=4),
        OddImage("ycck.jpg", _ycck(rgb), rgb, tolerance=4),
        OddImage("junk_after_end.jpg", plain + b"\0junk" * 50, rgb, tolerance=4),
        OddImage("really_png.jpg", encode(rgb, "PNG"), rgb),
    ]


def _ycck(rgb: np.ndarray) -> bytes:
    """Pillow writes CMYK JPEGs with inverted planes and colour transform 0; here the planes are YCbCr of the CMY values
    and the transform byte of the Adobe segment is set to 2, which is YCCK."""
    c, m, y, k = Image.fromarray(rgb).convert("CMYK").split()
    luma = Image.merge("RGB", (c, m, y)).convert("YCbCr").split()
    inverted = [Image.eval(plane, lambda value: 255 - value) for plane in luma]
    data = bytearray(encode(Image.merge("CMYK", (*inverted, k)), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def _oriented() -> list[OddImage]:
    """EXIF orientations 1 to 8: the stored picture is turned so that applying the tag gives `picture()` back."""
    upright = picture()
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    cases = []
    for value, stored in undo.items():
        exif = Image.Exif()
        exif[0x0112] = value
        data = encode(np.ascontiguousarray(stored), "JPEG", quality=95, exif=exif)
        cases.append(OddImage(f"orientation_{value}.jpg", data, upright, tolerance=4))
    broken = encode(upright, "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\x07" * 30)
    cases.append(OddImage("corrupt_exif.jpg", broken, upright, tolerance=4))
    return cases


def _deep() -> list[OddImage]:
    rgb = picture()
    gray = _gray(rgb)
    gray16 = gray.astype(np.uint16) * 257
    unit = gray.astype(np.float32) / 255
    return [
        OddImage("gray16.png", encode(gray16, "PNG"), _as_rgb(gray), tolerance=0.5),
        OddImage("gray16.tif", encode(gray16, "TIFF"), _as_rgb(gray), tolerance=0.5),
        OddImage("gray32.tif", encode(gray.astype(np.int32) * 8421504, "TIFF"), _as_rgb(gray), tolerance=1),
        OddImage("rgb16.png", _rgb16_png(rgb), rgb, tolerance=0.5),
        OddImage("float.tif", encode(unit, "TIFF"), _as_rgb(gray), tolerance=0.5),
        OddImage("bits.png", encode(Image.fromarray(gray > 100), "PNG"), _as_rgb((gray > 100).astype(np.uint8) * 255)),
        OddImage("float_wide.tif", encode(unit * 3000, "TIFF"), None, "floating-point pixels"),
    ]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _rgb16_png(rgb: np.ndarray) -> bytes:
    """16 bits a channel; Pillow reads it but cannot write it."""
    height, width, _ = rgb.shape
    rows = (rgb.astype(np.uint16) * 257).astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw)) + _chunk(b"IEND", b"")


def _transparent() -> list[OddImage]:
    """The left half is fully transparent over leftover colours, and must come out white."""
    rgb = picture()
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    white = np.where(alpha[..., None] == 0, np.uint8(255), rgb)
    gray = _gray(rgb)
    white_gray = _as_rgb(np.where(alpha == 0, np.uint8(255), gray))
    palette = Image.fromarray(rgb).quantize(4)
    used = np.asarray(palette)
    transparent = int(used[0, 0])
    see_through = np.where((used == transparent)[..., None], np.uint8(255), rgb)
    return [
        OddImage("rgba.png", encode(np.dstack([rgb, alpha]), "PNG"), white),
        OddImage("la.png", encode(np.dstack([gray, alpha]), "PNG"), white_gray),
        OddImage("palette.png", encode(palette, "PNG"), rgb, tolerance=1),
        OddImage("palette_alpha.png", encode(palette, "PNG", transparency=transparent), see_through, tolerance=1),
        OddImage("rgb_key.png", encode(rgb, "PNG", transparency=_COLOURS[0]), _without(rgb, _COLOURS[0])),
    ]


def _without(rgb: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.where((rgb == np.array(colour)).all(-1, keepdims=True), np.uint8(255), rgb)


def _animated() -> list[OddImage]:
    rgb = picture()
    more = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)], "duration": 100}
    cases = [
        OddImage("animated.gif", encode(Image.fromarray(rgb).quantize(16), "GIF", **more), rgb, tolerance=1),
        OddImage("animated.png", encode(rgb, "PNG", **more), rgb),
        OddImage("pages.tif", encode(rgb, "TIFF", save_all=True, append_images=more["append_images"]), rgb),
        OddImage(
            "stereo.jpg", encode(rgb, "MPO", quality=95, save_all=True, append_images=more["append_images"]), rgb, "", 4
        ),
    ]
    if features.check("webp"):
        cases.append(OddImage("animated.webp", encode(rgb, "WEBP", lossless=True, **more), rgb))
    return cases


def _sizes() -> list[OddImage]:
    dot = np.full((1, 1, 3), (10, 200, 30), np.uint8)
    tower = np.ascontiguousarray(np.broadcast_to(np.uint8(77), (5000, 1, 3)))
    return [
        OddImage("dot.png", encode(dot, "PNG"), dot),
        OddImage("dot.jpg", encode(dot, "JPEG", quality=95), dot, tolerance=4),
        OddImage("tower.png", encode(tower, "PNG"), tower),
        OddImage("wall.png", encode(tower.transpose(1, 0, 2), "PNG"), tower.transpose(1, 0, 2)),
    ]


def _other_formats() -> list[OddImage]:
    rgb = picture()
    cases = [
        OddImage("plain.bmp", encode(rgb, "BMP"), rgb),
        OddImage("plain.ppm", encode(rgb, "PPM"), rgb),
        OddImage("cmyk.tif", encode(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb, tolerance=1),
    ]
    if features.check("jpg_2000"):
        cases.append(OddImage("plain.jp2", encode(rgb, "JPEG2000"), rgb, tolerance=1))
    if features.check("webp"):
        cases.append(OddImage("plain.webp", encode(rgb, "WEBP", lossless=True), rgb))
    if features.check("avif"):
        cases.append(OddImage("plain.avif", encode(rgb, "AVIF", quality=95), rgb, tolerance=6))
    return cases


def _refused() -> list[OddImage]:
    jpeg, png, gif = encode(noise(), "JPEG", quality=95), encode(noise(), "PNG"), encode(noise(), "GIF")
    cases = [
        OddImage("empty.jpg", b"", None, "empty"),
        OddImage("text.jpg", b"<html>404 not found</html>\n" * 20, None, "not an image"),
        OddImage("unknown_codec.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, None),
        OddImage("cut_50.gif", gif[: len(gif) // 2], None, "truncated"),
        OddImage("bomb.png", _bomb_png(20000), None, "limit of"),
        OddImage("bomb.jpg", _bomb_jpeg(65000), None, "limit of"),
    ]
    for percent in (1, 25, 50, 99):
        cases.append(OddImage(f"cut_{percent}.jpg", jpeg[: len(jpeg) * percent // 100], None, "runcated"))
        cases.append(OddImage(f"cut_{percent}.png", png[: len(png) * percent // 100], None, "runcated"))
    return cases


def _bomb_png(side: int) -> bytes:
    """A few hundred bytes that claim side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = _chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body


def _bomb_jpeg(side: int) -> bytes:
    """A small JPEG whose frame header (SOF0) claims side x side pixels."""
    data = bytearray(encode(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)
