"""The size of an image, and whether a fast decoder may have it, from the first bytes of its file: nothing is decoded.

JPEG (ITU-T T.81: markers and segments; the colour transform in the Adobe segment; EXIF 2.3 for the orientation) and PNG
(ISO/IEC 15948: chunks) are understood. Everything else is left to `decode.py`.
"""

import re
import struct
from typing import NamedTuple
from zlib import crc32

from mimfast.data.decode import MAX_PIXELS, BadImage

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive, all with Huffman codes
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
# chunks that change no pixel, but for the text with which some programs keep an orientation
_PNG_CHUNKS = frozenset(
    (b"PLTE", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME")
)
_PNG_TEXT = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_PNG_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type ")


class Header(NamedTuple):
    """What a file says about its image.

    width, height: of the upright image, in pixels; 0 where only a decoder can tell. format: "jpeg", "png" or "other".
    orientation: 1 to 8 as in EXIF, 1 where the file says nothing. plain: the file is whole as far as its structure
    shows, and nothing in it is left to taste (8 bits, RGB or gray, no transparency, upright, one picture), so that
    every decoder gives the pixels that `decode.decode` promises.
    """

    width: int
    height: int
    format: str
    orientation: int
    plain: bool


_OTHER = Header(0, 0, "other", 1, False)


def look(data: bytes) -> Header:
    """The header of a whole image file. Raises BadImage, and nothing else, where it cannot be an image, is cut off
    before its size, has no pixels, or more than decode.MAX_PIXELS."""
    if not data:
        raise BadImage("the file is empty")
    try:
        if data.startswith(_JPEG):
            header = _jpeg(data)
        elif data.startswith(_PNG):
            header = _png(data)
        else:
            return _OTHER
    except (IndexError, struct.error):
        raise BadImage("truncated inside the header") from None
    if header.width * header.height > MAX_PIXELS:
        raise BadImage(f"{header.width}x{header.height} is more than the limit of {MAX_PIXELS} pixels")
    if header.format != "other" and not (header.width and header.height):
        raise BadImage(f"{header.width}x{header.height} has no pixels")
    return header


def _jpeg(data: bytes) -> Header:
    at, frame, plain = 2, -1, True
    jfif, adobe = False, -1
    exif = xmp = None  # orientation; 0 where a block is there and cannot be understood
    while True:
        if data[at] != 0xFF:
            return _OTHER  # decoders skip such bytes, each in its way
        marker = data[at + 1]
        if marker in (0xDA, 0xD9):
            break
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            plain &= frame < 0
            frame = at
        elif marker in _OTHER_FRAMES:
            frame, plain = at, False
        elif marker == 0xE0:
            jfif |= data.startswith(b"JFIF\0", at + 4)
        elif marker == 0xE1:
            if data.startswith(b"Exif\0\0", at + 4):
                exif = 0 if exif is not None else _exif(data, at + 10, at + 2 + length)
            elif data.startswith(_XMP, at + 4):
                xmp = _xmp(data, at + 4, at + 2 + length)
            else:
                plain = False  # some decoders take it for EXIF
        elif marker == 0xE2:
            plain &= not data.startswith(b"MPF\0", at + 4)  # several pictures
        elif marker == 0xEE and data.startswith(b"Adobe", at + 4):
            adobe = data[at + 15]
        at += 2 + length
    if frame < 0:
        raise BadImage("a JPEG without a frame header")
    precision, height, width, components = struct.unpack_from(">BHHB", data, frame + 4)
    plain &= precision == 8 and exif != 0 and _is_known_colour(data, frame, components, jfif, adobe)
    plain &= marker == 0xDA and (data.endswith(_END) or data.find(_END, at) >= 0)
    orientation = next((found for found in (exif, xmp) if found and found > 0), 1)
    if orientation >= 5:
        width, height = height, width
    return Header(width, height, "jpeg", orientation, bool(plain) and orientation == 1)


def _is_known_colour(data: bytes, frame: int, components: int, jfif: bool, adobe: int) -> bool:
    """Gray, or YCbCr without a doubt."""
    if components != 3:
        return components == 1
    if adobe >= 0:
        return adobe == 1
    return jfif or (data[frame + 10], data[frame + 13], data[frame + 16]) == (1, 2, 3)


def _exif(data: bytes, start: int, end: int) -> int:
    """The orientation in a TIFF header: -1 when it has none, 0 when it is not understood."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[start : start + 4])
    if order is None or end > len(data):
        return 0
    (first,) = struct.unpack_from(order + "I", data, start + 4)
    at = start + first
    if at + 2 > end:
        return 0
    (entries,) = struct.unpack_from(order + "H", data, at)
    if at + 2 + 12 * entries > end:
        return 0
    wanted = _ORIENTATION_TAG.to_bytes(2, "little" if order == "<" else "big")
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        if data[entry : entry + 2] == wanted:
            kind, count, value = struct.unpack_from(order + "HIH", data, entry + 2)
            if kind != 3 or count != 1:
                return 0
            return value if 1 <= value <= 8 else 1
    return -1


def _xmp(data: bytes, start: int, end: int) -> int:
    """As `_exif`, for a block of XMP."""
    found = _XMP_ORIENTATION.search(data, start, end)
    return int(found[1]) if found and 1 <= int(found[1]) <= 8 else -1


def _png(data: bytes) -> Header:
    length, kind, width, height, depth, colour, _, _, interlace = struct.unpack_from(">I4sIIBBBBB", data, 8)
    if kind != b"IHDR":
        raise BadImage("a PNG without a header chunk")
    plain = not interlace and (colour == 3 or (depth == 8 and colour in (0, 2)))
    at = 20 + length
    while plain:
        if at + 12 > len(data):
            plain = False
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            break
        if kind != b"IDAT":  # decoders differ in how much a damaged chunk beside the pixels matters
            text = kind in _PNG_TEXT and not data.startswith(_PNG_ORIENTED, at + 8)
            end = at + 8 + length
            plain = (text or kind in _PNG_CHUNKS) and data[end : end + 4] == crc32(data[at + 4 : end]).to_bytes(
                4, "big"
            )
        at += 12 + length
    return Header(width, height, "png", 1, plain)
