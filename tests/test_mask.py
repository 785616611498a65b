"""Mask: what it holds, how it is made, what it refuses."""

import pytest
import torch

from mimfast import Mask
from mimfast._check import UserError


def assert_consistent(mask: Mask) -> None:
    """The three views agree, and rows are ascending."""
    batch, tokens = mask.hidden.shape
    assert mask.grid[0] * mask.grid[1] == tokens
    assert (mask.keep.diff(dim=1) > 0).all()
    assert torch.equal(mask.hidden, torch.ones_like(mask.hidden).scatter(1, mask.keep, False))
    order = torch.arange(tokens).expand(batch, -1).scatter(1, mask.inverse, torch.arange(tokens).expand(batch, -1))
    assert torch.equal(order[:, : mask.visible], mask.keep)
    assert (order[:, mask.visible :].diff(dim=1) > 0).all()
    assert torch.equal(mask.inverse >= mask.visible, mask.hidden)


@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.75), ((16, 16), 0.75), ((5, 7), 0.6), ((1, 3), 0.0)])
def test_random_keeps_exactly_the_mae_count(grid: tuple[int, int], ratio: float) -> None:
    mask = Mask.random(5, grid, ratio)
    assert mask.visible == int(grid[0] * grid[1] * (1 - ratio))
    assert_consistent(mask)


def test_random_is_a_function_of_the_sample_or_of_torchs_generator() -> None:
    ids = torch.tensor([3, 9, 4])
    first = Mask.random(3, (8, 8), 0.75, sample_ids=ids, seed=1, epoch=2)
    again = Mask.random(3, (8, 8), 0.75, sample_ids=ids.flip(0), seed=1, epoch=2)
    assert torch.equal(first.hidden, again.hidden.flip(0))
    torch.manual_seed(7)
    drawn = Mask.random(3, (8, 8), 0.75)
    assert not torch.equal(drawn.hidden, Mask.random(3, (8, 8), 0.75).hidden)
    torch.manual_seed(7)
    assert torch.equal(drawn.hidden, Mask.random(3, (8, 8), 0.75).hidden)


def test_from_hidden_is_the_inverse_of_random() -> None:
    random = Mask.random(4, (6, 6), 0.5)
    made = Mask.from_hidden(random.hidden)
    for name in ("keep", "inverse", "hidden", "grid"):
        found, wanted = getattr(made, name), getattr(random, name)
        assert found == wanted if name == "grid" else torch.equal(found, wanted)


def test_from_hidden_takes_a_grid_that_is_not_square() -> None:
    hidden = torch.tensor([[True, False, True, False, True, False], [False, False, False, True, True, True]])
    mask = Mask.from_hidden(hidden, grid=(2, 3))
    assert mask.grid == (2, 3)
    assert mask.keep.tolist() == [[1, 3, 5], [0, 1, 2]]
    assert mask.inverse[0].tolist() == [3, 0, 4, 1, 5, 2]
    assert_consistent(mask)


UNEQUAL = torch.tensor([[True, False, False, True], [True, False, False, False]])


@pytest.mark.parametrize(
    ("hidden", "grid", "message"),
    [
        (UNEQUAL, None, r"hidden has 1 hidden tokens in row 1, expected 2 because row 0 hides 2"),
        (torch.ones(2, 4, dtype=torch.bool), None, r"hidden has all 4 tokens hidden, expected at least one visible"),
        (UNEQUAL.float(), None, r"hidden has dtype float32, expected bool because True must mean hidden"),
        (UNEQUAL.long(), None, r"hidden has dtype int64, expected bool"),
        (UNEQUAL[0], None, r"hidden has shape \(4,\), expected \(batch, tokens\)"),
        (torch.zeros(2, 6, dtype=torch.bool), None, r"hidden has 6 tokens, expected a square number, or grid="),
        (torch.zeros(2, 6, dtype=torch.bool), (2, 4), r"hidden has 6 tokens, expected 8 because grid 2x4 has 8"),
    ],
)
def test_from_hidden_refuses(hidden: torch.Tensor, grid: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mask.from_hidden(hidden, grid)
