"""The learning rate is a closed form of the step: warm-up, peak, cosine, end."""

import math

import pytest

from mimfast.train.schedule import lr_at


def test_warms_up_linearly_peaks_and_ends_low():
    rates = [lr_at(step, 100, 1.0, low=0.1, warmup=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_half_way_down_the_cosine_is_half_the_rate():
    assert lr_at(50, 100, 2.0) == pytest.approx(1.0)
    assert lr_at(25, 100, 2.0) == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize("warmup", [0.0, 1e-9, 0.5, 1.0])
def test_one_step_moves_the_weights(warmup):
    assert lr_at(0, 1, 1.0, warmup=warmup) == pytest.approx(1.0)


def test_multistep_is_constant_between_milestones():
    rates = [lr_at(step, 8, 1.0, warmup=0.25, schedule="multistep", milestones=(0.5, 0.875)) for step in range(8)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_the_warm_up_may_begin_above_zero():
    assert [lr_at(step, 10, 1.0, warmup=0.4, start=0.2) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
