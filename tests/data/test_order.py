import tracemalloc

import numpy as np
import pytest

from mimfast._check import UserError
from mimfast.data.order import sample_at


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 99, 256, 1000, 4097])
def test_every_epoch_is_a_permutation(n):
    epochs, ids = sample_at(np.arange(3 * n), n, seed=11)
    np.testing.assert_array_equal(epochs, np.repeat([0, 1, 2], n))
    for epoch in range(3):
        assert sorted(ids[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ():
    n = 1000
    first, second, other = (sample_at(np.arange(n) + at, n, seed)[1] for at, seed in ((0, 5), (n, 5), (0, 6)))
    # Two random permutations agree at one place on average.
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).sum() < 10


def test_high_bits_of_the_seed_count():
    assert (sample_at(np.arange(100), 100, 1)[1] != sample_at(np.arange(100), 100, 1 + (1 << 32))[1]).any()


def test_any_shape_and_any_order_of_positions():
    positions = np.array([[700, 3], [12, 4001]])
    epochs, ids = sample_at(positions, 500, 3)
    assert epochs.shape == ids.shape == (2, 2)
    assert epochs.dtype == ids.dtype == np.int64
    for position, epoch, index in zip(positions.ravel(), epochs.ravel(), ids.ravel()):
        assert sample_at(int(position), 500, 3) == (epoch, index)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 10])
def test_places_are_uniform_over_epochs(n):
    epochs = 3000
    ids = sample_at(np.arange(epochs * n), n, seed=2)[1].reshape(epochs, n)
    for place in range(n):
        counts = np.bincount(ids[:, place], minlength=n)
        chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
        assert chi2 < n - 1 + 5 * np.sqrt(2 * n), f"place {place}: {counts}"


def test_all_permutations_of_a_small_set_occur_equally_often():
    epochs = 4800
    ids = sample_at(np.arange(epochs * 4), 4, seed=9)[1].reshape(epochs, 4)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 130
    assert counts.max() < 270


def test_neighbours_land_far_apart():
    n = 100_000
    ids = sample_at(np.arange(20_000), n, seed=4)[1]
    steps = np.abs(np.diff(ids)) / n
    assert abs(steps.mean() - 1 / 3) < 0.01


@pytest.mark.parametrize("n", [10**12 + 39, (1 << 62) - 57, 1 << 62])
def test_huge_sets_need_no_memory(n):
    tracemalloc.start()
    epochs, ids = sample_at(np.arange(1000), n, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert (epochs == 0).all()
    assert len(set(ids.tolist())) == 1000
    assert ids.min() >= 0
    assert ids.max() < n
    assert 0.4 < ids.astype(float).mean() / n < 0.6


def test_wrong_arguments():
    with pytest.raises(UserError, match="sample_at: n has 0, expected 1 to"):
        sample_at(0, 0, 1)
    with pytest.raises(UserError, match="sample_at: position has -3, expected >= 0"):
        sample_at(np.array([1, -3]), 5, 1)
    with pytest.raises(UserError, match="sample_at: seed has -1"):
        sample_at(0, 5, -1)
