"""Philox against the published vectors, and its addressing against a plain-integer twin."""

import numpy as np
import pytest
import torch

from mimfast import philox
from mimfast._check import UserError

# Random123, kat_vectors, philox4x32 10: counter, key, result
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
IDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1]
SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1]


def unhex(text: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in text.split())


def word_by_integers(seed: int, stream: int, epoch: int, sample_id: int, w: int) -> int:
    """The address and the ten rounds once more in Python integers, where nothing can overflow."""
    low = 2**32 - 1
    c = [stream << 24 | w >> 2, epoch & low, sample_id & low, sample_id >> 32 & low]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c[w & 3]


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
@pytest.mark.parametrize("wrap", [lambda v: np.array([v]), lambda v: torch.tensor([v])], ids=["numpy", "torch"])
def test_published_vectors(counter, key, result, wrap):
    found = philox.philox4x32(tuple(wrap(v) for v in unhex(counter)), unhex(key))
    assert tuple(int(v[0]) for v in found) == unhex(result)


@pytest.mark.parametrize("seed", SEEDS)
def test_addressing(seed):
    for stream, epoch in [(philox.STREAM_MASK, 0), (philox.STREAM_REPLACE, 2**32 - 1), (255, 3)]:
        wanted = [[word_by_integers(seed, stream, epoch, i, w) for w in range(9)] for i in IDS]
        assert philox.words(seed, stream, epoch, np.array(IDS), 9).tolist() == wanted
        assert philox.words(seed, stream, epoch, np.array(IDS, dtype=np.uint64), 9).tolist() == wanted
        found = philox.words(seed, stream, epoch, torch.tensor(IDS), 9)
        assert found.dtype == torch.int64
        assert found.tolist() == wanted


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_one_epoch_per_sample(kind):
    ids, epochs = [5, 5, 6], [0, 1, 2**40 + 1]  # the low 32 bits of the epoch count
    make = np.array if kind == "numpy" else torch.tensor
    found = philox.words(3, philox.STREAM_CROP, make(epochs), make(ids), 5)
    for row, i, e in zip(found.tolist(), ids, epochs):
        assert row == [word_by_integers(3, philox.STREAM_CROP, e, i, w) for w in range(5)]


def test_negative_ids_are_their_bit_pattern():
    signed, unsigned = np.array([-1, -(2**63)]), np.array([2**64 - 1, 2**63], dtype=np.uint64)
    assert np.array_equal(philox.words(1, 1, 0, signed, 8), philox.words(1, 1, 0, unsigned, 8))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 197])
def test_count_only_cuts(count):
    long = philox.words(9, 1, 2, torch.arange(3), 200)
    assert torch.equal(philox.words(9, 1, 2, torch.arange(3), count), long[:, :count])
    assert philox.words(9, 1, 2, np.arange(0), count).shape == (0, count)


def test_uniform_is_exact_open_and_flat():
    ids = np.arange(4096)
    u = philox.uniform(11, 1, 0, ids, 64)
    assert u.dtype == np.float64
    assert u.min() > 0
    assert u.max() < 1
    assert np.array_equal(u, philox.uniform(11, 1, 0, torch.from_numpy(ids), 64).numpy())
    assert np.array_equal(u * 2**32 - 0.5, philox.words(11, 1, 0, ids, 64))
    counts = np.bincount((u.ravel() * 64).astype(int), minlength=64)
    chi2 = ((counts - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert 25 < chi2 < 120, chi2  # 63 degrees of freedom: mean 63, deviation 11
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.07
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.07


def test_streams_epochs_and_seeds_differ():
    base = philox.words(1, 1, 0, np.arange(8), 8)
    for other in (
        philox.words(2, 1, 0, np.arange(8), 8),
        philox.words(1, 2, 0, np.arange(8), 8),
        philox.words(1, 1, 1, np.arange(8), 8),
    ):
        assert not (base == other).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"philox: seed has -1, expected an int in \[0, 2\*\*64\) because"),
        ({"seed": 2**64}, "philox: seed has 18446744073709551616, expected"),
        ({"stream": 256}, "philox: stream has 256, expected 0 to 255 because it fills 8 bits"),
        ({"count": 2**26 + 1}, "philox: count has 67108865, expected 0 to 67108864 because"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        philox.words(**({"seed": 0, "stream": 1, "epoch": 0, "sample_ids": np.arange(2), "count": 4} | change))


def test_words_compile_without_a_break():
    words = torch.compile(philox.words, fullgraph=True, backend="eager")
    assert torch.equal(words(2**64 - 1, 1, 3, torch.arange(5), 10), philox.words(2**64 - 1, 1, 3, torch.arange(5), 10))
