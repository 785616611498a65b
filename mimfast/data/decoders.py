"""Which code turns the bytes of an image file into pixels."""

from typing import Protocol

import numpy as np

from mimfast._check import fail
from mimfast.data.decode import decode

DECODERS = ("auto", "pillow")


class Decoder(Protocol):
    """Safe to call from many threads. `pixels`: as `decode.decode`, uint8 (H, W, 3), or BadImage."""

    name: str

    def pixels(self, data: bytes, min_side: int | None) -> np.ndarray: ...


class Pillow:
    name = "pillow"

    def pixels(self, data: bytes, min_side: int | None) -> np.ndarray:
        return decode(data, min_side)


def open_decoder(name: str) -> Decoder:
    """The decoder of a name of DECODERS. Raises UserError."""
    if name not in DECODERS:
        fail("loader", "decoder", repr(name), " or ".join(map(repr, DECODERS)), "no other decoder is known")
    return Pillow()
