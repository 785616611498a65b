import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mimfast.data.decode import MAX_PIXELS, BadImage, decode
from mimfast.data.header import Header, look
from mimfast.testing.images import encode, noise, odd_images, picture

CASES = {case.name: case for case in odd_images()}
PLAIN = {
    "plain.jpg", "UPPER.JPEG", "progressive.jpg", "full_chroma.jpg", "gray.jpg", "junk_after_end.jpg",
    "really_png.jpg", "orientation_1.jpg", "palette.png", "dot.png", "dot.jpg", "tower.png", "wall.png",
}  # fmt: skip


def seen(data):
    try:
        return look(data)
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("name", CASES)
def test_odd_images(name):
    case = CASES[name]
    header = seen(case.data)
    assert (isinstance(header, Header) and header.plain) == (name in PLAIN)
    if isinstance(header, str):
        assert case.pixels is None, header
    elif header.format == "other":
        assert header == Header(0, 0, "other", 1, False)
    elif case.pixels is not None:
        assert (header.height, header.width) == decode(case.data).shape[:2]
        assert header.format == ("png" if case.data.startswith(b"\x89PNG") else "jpeg")
        assert header.orientation == (int(name[12]) if name.startswith("orientation") else 1)


def test_a_cut_file_is_never_plain():
    for kind in ("JPEG", "PNG"):
        data = encode(noise(20, 16), kind)
        for end in range(len(data)):
            header = seen(data[:end])
            assert isinstance(header, str) or not header.plain, (kind, end)


def test_refused_with_a_reason():
    assert seen(b"") == "the file is empty"
    assert seen(CASES["bomb.jpg"].data) == f"65000x65000 is more than the limit of {MAX_PIXELS} pixels"
    assert seen(CASES["bomb.png"].data) == f"20000x20000 is more than the limit of {MAX_PIXELS} pixels"
    jpeg = encode(picture(), "JPEG")
    assert seen(jpeg[:40]) == "truncated inside the header"
    assert seen(b"\xff\xd8\xff\xd9") == "a JPEG without a frame header"
    assert seen(b"\x89PNG\r\n\x1a\n" + b"\0" * 40) == "a PNG without a header chunk"
    flat = bytearray(jpeg)
    at = flat.index(b"\xff\xc0") + 5
    flat[at : at + 2] = b"\0\0"
    assert seen(bytes(flat)) == "64x0 has no pixels"


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_what_the_decoder_applies(order):
    """Values 0 and above 8 are upright; other types than a short one are left to the decoder."""
    wide = encode(picture(64, 48), "JPEG", quality=95)
    for value in range(11):
        for kind, plain in ((3, value in (0, 1, 9, 10)), (4, False)):
            content = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
            tag = struct.pack(order + "HHI", 0x0112, kind, 1) + content
            tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 1) + tag + b"\0" * 4
            data = with_segment(wide, 0xE1, b"Exif\0\0" + tiff)
            header = look(data)
            assert header.plain == plain, (value, kind)
            if kind == 3:
                assert (header.height, header.width) == decode(data).shape[:2]


@pytest.mark.parametrize(("text", "orientation"), [('tiff:Orientation="6"', 6), ("tiff:Orientation>8<", 8), ("x", 1)])
def test_orientation_in_xmp(text, orientation):
    xmp = f"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta {text}/>".encode()
    data = with_segment(encode(picture(64, 48), "JPEG"), 0xE1, xmp)
    header = look(data)
    assert (header.orientation, header.plain) == (orientation, orientation == 1)
    assert (header.height, header.width) == decode(data).shape[:2]
    # a short EXIF block comes first, also where it says upright
    exif = Image.Exif()
    exif[0x0112] = 1
    both = with_segment(encode(picture(64, 48), "JPEG", exif=exif), 0xE1, xmp)
    assert look(both) == Header(64, 48, "jpeg", 1, True)
    assert decode(both).shape == (48, 64, 3)


def with_segment(jpeg, marker, body):
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def chunk(kind, body, damage=0):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        (chunk(b"gAMA", struct.pack(">I", 30000)), True),
        (chunk(b"tEXt", b"Software\0nobody"), True),
        (chunk(b"tEXt", b"Software\0nobody", damage=1), False),
        (chunk(b"eXIf", b"MM\0*"), False),
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"), False),
        (chunk(b"zTXt", b"Raw profile type exif\0\0"), False),
        (chunk(b"tRNS", b"\0" * 6), False),
        (chunk(b"acTL", b"\0" * 8), False),
        (chunk(b"prVt", b"private"), False),
    ],
)
def test_png_chunks(extra, plain):
    png = encode(picture(), "PNG")
    assert look(png[:33] + extra + png[33:]) == Header(64, 48, "png", 1, plain)


def test_jpeg_colours_in_doubt_are_not_plain():
    rgb = picture()
    adobe = b"Adobe\0\x64\0\0\0\0"
    bare = encode(rgb, "JPEG")
    bare = bare[:2] + bare[20:]  # without the JFIF segment: components 1, 2, 3
    assert look(bare).plain
    assert look(with_segment(bare, 0xEE, adobe + b"\1")).plain
    assert not look(with_segment(bare, 0xEE, adobe + b"\0")).plain
    letters = bytearray(bare)
    at = letters.index(b"\xff\xc0") + 10
    letters[at : at + 9 : 3] = b"RGB"
    assert not look(bytes(letters)).plain
    assert not look(bytes(letters).replace(b"\xff\xc0", b"\xff\xc9")).plain  # arithmetic codes


def test_fill_bytes_before_a_marker():
    jpeg = encode(picture(), "JPEG")
    assert look(jpeg[:2] + b"\xff\xff" + jpeg[2:]) == Header(64, 48, "jpeg", 1, True)
    assert look(jpeg[:20] + b"junk" + jpeg[20:]) == Header(0, 0, "other", 1, False)


def test_damage_is_a_header_or_a_reason():
    rng = np.random.default_rng(5)
    for name in ("plain.jpg", "orientation_6.jpg", "palette.png", "rgba.png", "stereo.jpg"):
        data = CASES[name].data
        for _ in range(300):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, min(len(damaged), 300), 3):
                damaged[at] = rng.integers(0, 256)
            with contextlib.suppress(BadImage):
                assert isinstance(look(bytes(damaged)), Header)
