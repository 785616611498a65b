"""Philox4x32-10, the counter-based generator behind every random decision of the package.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. A word depends
on nothing but (seed, stream, epoch, sample id, position): the same image gets the same mask and crop on every device,
for every batch size, worker count and number of GPUs. csrc/philox.h holds the same addressing for C++ and CUDA:

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (stream << 24 | block, epoch low 32 bits, sample id low 32 bits, sample id high 32 bits)
    word w of a stream lives in block w >> 2, lane w & 3

B samples, N words of one sample, G = ceil(N / 4) blocks. Arithmetic is in int64 and never overflows: products are taken
in two halves of 16 bits, so that traced, compiled and interpreted code agree to the last bit.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from mimfast._check import fail

STREAM_MASK = 1
STREAM_CROP = 2
STREAM_ORDER = 3
STREAM_REPLACE = 4
STREAM_BLOCK = 5
STREAM_TUBE = 6
STREAM_COLOUR = 7

MAX_WORDS = 1 << 26  # 24 bits of block number, four words each

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def _multiply(factor: int, x: Any) -> tuple[Any, Any]:
    """High and low 32 bits of factor * x for 0 <= x < 2^32, through partial products below 2^49."""
    upper = x * (factor >> 16)
    lower = x * (factor & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four values, arrays or tensors (int64, broadcastable) with elements in [0, 2^32).
        key: two ints in [0, 2^32).
    Returns:
        four values of the broadcast shape with elements in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def check_seed(op: str, seed: int) -> None:
    """Raise UserError unless seed is an int in [0, 2^64), the size of the key."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        fail(op, "seed", repr(seed), "an int in [0, 2**64)", "it is the 64-bit key of Philox")


def words(seed: int, stream: int, epoch: int | Array, sample_ids: Array, count: int, first: int = 0) -> Array:
    """`count` words of a stream for each sample, from word `first` on.

    Args:
        seed: int in [0, 2^64).
        stream: one of the STREAM_ constants.
        epoch: int, or (B,) integers of the kind of sample_ids; the low 32 bits count.
        sample_ids: (B,) numpy int64 or uint64 array, or torch int64 tensor on any device; all 64 bits count.
        count: N.
        first: a multiple of 4; first + count is at most 2^26.
    Returns:
        (B, N) int64, values in [0, 2^32), numpy for numpy and torch (same device) for torch.
    Raises:
        UserError: seed, stream, count or first out of range.
    """
    check_seed("philox", seed)
    if not 0 <= stream < 256:
        fail("philox", "stream", stream, "0 to 255", "it fills 8 bits of the counter")
    if not 0 <= count <= MAX_WORDS - first:
        fail("philox", "count", count, f"0 to {MAX_WORDS - first}", "a stream has 2**24 blocks of four words")
    if first < 0 or first % 4:
        fail("philox", "first", first, "a multiple of 4", "words come in blocks of four")
    blocks = (count + 3) // 4
    if isinstance(sample_ids, np.ndarray):
        sample_ids = sample_ids.astype(np.int64)
        block_G: Any = np.arange(first // 4, first // 4 + blocks, dtype=np.int64)
        stack: Any = np.stack
    else:
        block_G = torch.arange(first // 4, first // 4 + blocks, dtype=torch.int64, device=sample_ids.device)
        stack = torch.stack
    ids_B1: Any = sample_ids[:, None]
    epoch_B1: Any = epoch if isinstance(epoch, int) else epoch[:, None]
    counter = (block_G | (stream << 24), epoch_B1 & _LOW32, ids_B1 & _LOW32, (ids_B1 >> 32) & _LOW32)
    lanes_BG = philox4x32(counter, (seed & _LOW32, seed >> 32))
    return stack(lanes_BG, -1).reshape(len(sample_ids), 4 * blocks)[:, :count]


def uniform(seed: int, stream: int, epoch: int | Array, sample_ids: Array, count: int) -> Array:
    """The same as `words`, as float64 in (0, 1): (word + 0.5) / 2^32, exact in float64."""
    word_BN: Any = words(seed, stream, epoch, sample_ids, count)
    exact_BN: Any = word_BN.astype(np.float64) if isinstance(word_BN, np.ndarray) else word_BN.double()
    return (exact_BN + 0.5) * 2.0**-32
