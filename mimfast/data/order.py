"""The order of samples as a pure function position -> (epoch, sample id), in memory that does not grow with the set.

Each epoch is a permutation of 0..n-1 keyed by (seed, epoch): a Feistel network on pairs (left, right) of numbers below
side = ceil(sqrt(n)), with addition modulo side in place of exclusive or, so that the domain side^2 is barely larger
than n. A value at or above n is sent through the network again until it falls below n ("cycle walking"), which keeps
the map a permutation.
Source: Luby, Rackoff, SIAM J. Comput. 17(2), 1988 (network); Black, Rogaway, CT-RSA 2002, section 3 (cycle walking).
Round keys are words of Philox's STREAM_ORDER; the round function is a 32-bit integer hash of (right, round key).
"""

import math

import numpy as np

from mimfast import philox
from mimfast._check import fail

_ROUNDS = 8


def sample_at(position: np.ndarray | int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and sample id at places of the endless order.

    Args:
        position: int or integer array of any shape, values >= 0.
        n: number of samples, 1 to 2^62.
        seed: int in [0, 2^64).
    Returns:
        epoch = position // n and sample id in [0, n), both int64 in the shape of position. Over the n positions of an
        epoch every id occurs once.
    Raises:
        UserError: n or seed out of range, a negative position.
    """
    philox.check_seed("sample_at", seed)
    if not 1 <= n <= 1 << 62:
        fail("sample_at", "n", n, "1 to 2**62", "it is the number of samples")
    place = np.asarray(position, np.int64)
    if (place < 0).any():
        fail("sample_at", "position", int(place.min()), ">= 0", "positions count samples from the start of the run")
    epoch, rank = np.divmod(place.ravel(), n)
    index = _permute(rank, epoch, n, seed)
    return epoch.reshape(place.shape), index.reshape(place.shape)


def _permute(rank: np.ndarray, epoch: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Cycle walking: values at or above n go through the network again. rank, epoch, result: (P,) int64."""
    side = math.isqrt(n - 1) + 1
    epochs, of_epoch = np.unique(epoch, return_inverse=True)
    keys_ER = philox.words(seed, philox.STREAM_ORDER, epochs, np.zeros_like(epochs), _ROUNDS).astype(np.uint32)
    index = _network(rank, keys_ER[of_epoch], side)
    while True:
        walking = np.flatnonzero(index >= n)
        if walking.size == 0:
            return index
        index[walking] = _network(index[walking], keys_ER[of_epoch[walking]], side)


def _network(value: np.ndarray, keys_PR: np.ndarray, side: int) -> np.ndarray:
    left, right = np.divmod(value, side)
    for r in range(_ROUNDS):
        left, right = right, (left + _mix(right.astype(np.uint32), keys_PR[:, r])) % side
    return left * side + right


def _mix(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A 32-bit hash of (value, key), uint32 in, int64 out: every input bit is spread over the whole word."""
    h = (value ^ key) * np.uint32(0x9E3779B1)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13)) ^ key) * np.uint32(0xC2B2AE35)
    return (h ^ (h >> np.uint32(16))).astype(np.int64)
