"""Which code turns the bytes of an image file into pixels: `decode.decode` or something faster with the same pixels.

The faster codes get only what `header.look` calls plain, JPEG files of 8 bits, gray or YCbCr, upright and whole, where
nothing is left to taste: all of them are libjpeg-turbo inside and differ from Pillow, if at all, by the rounding of
another version of it. Every other file, every JPEG that they refuse, and every reason for a bad image is Pillow's in
each decoder, so that the choice never decides which images are bad.

- pillow: Pillow's JPEG codec on the bytes as they are, without its reading of the file's metadata.
- torchcodec: `torchcodec.decoders.decode_jpeg` on the CPU. What may be decoded at reduced size is left to Pillow. For a
  file that is damaged and yet can be decoded, libjpeg writes a line to stderr, which Pillow prevents.
- nvimagecodec: the CPU backend of nvImageCodec, one decoder for each thread, as they must not share one. Otherwise as
  torchcodec. Where libjpeg gives up half-way, its version 0.9 turns to another codec, which paints the rest gray: so it
  gets JPEGs of one scan only, and only where nothing but data lies between scan and end.
- auto: torchcodec where it is installed, else pillow. bench/data/bench_throughput.py measures them; nvImageCodec is not
  faster than torchcodec on a CPU and several times larger.
- dali: whole batches, see the loader; `open_decoder` does not open it.
- dali_gpu: the same on a GPU, with crops that are only near those of the others, as DALI resizes them.
"""

import importlib
import os
import re
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from mimfast._check import UserError, fail
from mimfast.data import dali
from mimfast.data.decode import BadImage, decode
from mimfast.data.header import Header, look

DECODERS = ("auto", "pillow", "torchcodec", "nvimagecodec", "dali", "dali_gpu")

# name -> module, what pip installs
_PACKAGES = {
    "torchcodec": ("torchcodec.decoders", "torchcodec"),
    "nvimagecodec": ("nvidia.nvimgcodec", "'nvidia-nvimgcodec-cu13[all]'"),
}
# A marker in the data of a JPEG that is neither a stuffed byte, a restart nor a fill byte.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")

# data, header, shrink (1, 2, 4 or 8) -> uint8 (H, W, 3), or None or any exception where it cannot
_Jpeg = Callable[[bytes, Header, int], np.ndarray | None]


class Decoder(Protocol):
    """Safe to call from many threads. `pixels`: as `decode.decode`, uint8 (H, W, 3), or BadImage."""

    name: str

    def pixels(self, data: bytes, min_side: int | None) -> np.ndarray: ...


class _Portable:
    """Plain JPEGs by one code, everything else, and what that code refuses, by `decode.decode`."""

    def __init__(self, name: str, jpeg: _Jpeg) -> None:
        self.name = name
        self._jpeg = jpeg

    def pixels(self, data: bytes, min_side: int | None) -> np.ndarray:
        header = _plain_jpeg(data)
        if header is None:
            return decode(data, min_side)
        shrink = reduction(header, min_side)
        try:
            pixels = self._jpeg(data, header, shrink)
        except MemoryError:
            raise
        except Exception:  # each code has its own for damage; Pillow finds the reason, or pixels
            pixels = None
        if pixels is None or pixels.shape != (*_size(header, shrink)[::-1], 3):
            return decode(data, min_side)
        return pixels


def open_decoder(name: str) -> Decoder:
    """The decoder of a name of DECODERS. Raises UserError for other names, and where the package is not installed."""
    if name not in DECODERS:
        fail("loader", "decoder", repr(name), " or ".join(map(repr, DECODERS)), "no other decoder is known")
    if name.startswith("dali"):
        fail("loader", "decoder", f"'{name}'", "one that takes image by image", "DALI takes whole batches")
    if name == "auto":
        name = "pillow" if why_not("torchcodec") else "torchcodec"
    reason = why_not(name)
    if reason:
        raise UserError(reason)
    return _Portable(name, {"pillow": _by_pillow, "torchcodec": _torchcodec, "nvimagecodec": _nvimagecodec}[name]())


def why_not(name: str) -> str | None:
    """Why a decoder of DECODERS cannot be used here, one sentence; None where it can."""
    if name == "dali":
        return dali.why_not()
    if name == "dali_gpu":
        gpu = torch.cuda.is_available()
        return dali.why_not() if gpu else "loader: decoder 'dali_gpu' needs DALI and a CUDA GPU, torch sees no GPU here"
    if name not in _PACKAGES:
        return None
    module, package = _PACKAGES[name]
    try:
        _import(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            return _not_loaded(name, package, error)
        return f"loader: decoder '{name}' needs a package that is not installed: pip install {package}"
    except Exception as error:  # a library that is missing or was built for another torch
        return _not_loaded(name, package, error)
    return None


def _import(module: str) -> Any:
    # read when it is imported: its remarks about damaged files would go to the terminal
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    return importlib.import_module(module)


def _not_loaded(name: str, package: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"loader: decoder '{name}' is installed but cannot be loaded ({said}): pip install --upgrade {package}"


def _plain_jpeg(data: bytes) -> Header | None:
    try:
        header = look(data)
    except BadImage:
        return None
    return header if header.plain and header.format == "jpeg" else None


def reduction(header: Header, min_side: int | None) -> int:
    """What a JPEG is reduced by, as Pillow's `draft` chooses it: the largest of 1, 2, 4 and 8 that leaves both sides at
    least min_side pixels."""
    most = 1 if min_side is None else min(header.width // min_side, header.height // min_side)
    return next((shrink for shrink in (8, 4, 2) if most >= shrink), 1)


def _size(header: Header, shrink: int) -> tuple[int, int]:
    return -(-header.width // shrink), -(-header.height // shrink)


def _scan(data: bytes) -> int:
    """Where the image data of a plain JPEG begin, behind the header of its first scan."""
    at = 2
    while data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _pillow_jpeg(data: bytes, header: Header, shrink: int) -> np.ndarray:
    # the codec's arguments are those of the tile that Image.open would have made
    image = Image.frombytes("RGB", _size(header, shrink), data, "jpeg", ("RGB", "", shrink, 0))
    return np.asarray(image)


def _by_pillow() -> _Jpeg:
    return _pillow_jpeg


def _torchcodec() -> _Jpeg:
    decode_jpeg = _import("torchcodec.decoders").decode_jpeg

    def jpeg(data: bytes, header: Header, shrink: int) -> np.ndarray:
        if shrink > 1:
            return _pillow_jpeg(data, header, shrink)
        # given bytes, it would touch the warning filters of the process, which threads must not do at the same time
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode="RGB").permute(1, 2, 0).numpy()

    return jpeg


def _nvimagecodec() -> _Jpeg:
    nv = _import("nvidia.nvimgcodec")
    params = nv.DecodeParams(apply_exif_orientation=False, color_spec=nv.ColorSpec.SRGB)
    local = threading.local()

    def jpeg(data: bytes, header: Header, shrink: int) -> np.ndarray | None:
        if shrink > 1:
            return _pillow_jpeg(data, header, shrink)
        first = _MARKER.search(data, _scan(data))
        if first is None or first[1] != b"\xd9":
            return None
        if not hasattr(local, "decoder"):
            local.decoder = nv.Decoder(
                device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[nv.Backend(nv.CPU_ONLY)]
            )
        image = local.decoder.decode(nv.CodeStream(data), params=params)
        return None if image is None else np.asarray(image)

    return jpeg
