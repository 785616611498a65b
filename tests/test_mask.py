"""Mask: what it holds, how it is made, what it refuses."""

import dataclasses

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


def assert_packed(mask: Mask) -> None:
    """The lists of a mask with differing counts, from its map."""
    bounds, hide_bounds = mask.cu_seqlens.tolist(), mask.hide_cu_seqlens.tolist()
    assert bounds[0] == hide_bounds[0] == 0
    for b, row in enumerate(mask.hidden):
        assert mask.keep[bounds[b] : bounds[b + 1]].tolist() == (~row).nonzero().flatten().tolist()
        assert mask.hide[hide_bounds[b] : hide_bounds[b + 1]].tolist() == row.nonzero().flatten().tolist()
    assert (mask.keep[bounds[-1] :] == -1).all()
    assert (mask.hide[hide_bounds[-1] :] == -1).all()
    assert mask.check() is mask
    with pytest.raises(UserError, match="images of this mask keep different numbers of tokens"):
        _ = mask.visible


def test_a_ratio_for_each_image() -> None:
    mask = Mask.random(3, (6, 6), [0.5, 0.75, 0.0], unit=2)
    assert mask.cu_seqlens.tolist() == [0, 16, 24, 60]
    assert len(mask.keep) == 60
    assert_packed(mask)


@pytest.mark.parametrize("exact", [True, False])
def test_blockwise(exact: bool) -> None:
    mask = Mask.blockwise(5, (14, 14), 75, exact=exact)
    assert not torch.equal(mask.hidden, Mask.blockwise(5, (14, 14), 75, exact=exact).hidden)
    if exact:
        assert_consistent(mask.check())
        assert mask.visible == 121
    else:
        assert mask.hide.shape == (5 * 75,)
        assert_packed(mask)


def test_guided_prefers_what_is_important() -> None:
    importance = torch.ones(400, 36)
    importance[:, :9] = 20
    mask = Mask.guided(importance, (6, 6), 0.75)
    assert_consistent(mask.check())
    assert mask.visible == 9
    assert (mask.keep < 9).float().mean() > 0.6
    with pytest.raises(UserError, match=r"mask_guided: importance has -20\.0"):
        Mask.guided(-importance, (6, 6), 0.75, checked=True)


def test_tube_of_videomae() -> None:
    flat = Mask.random(4, (14, 14), 0.9, rounding="hide_floor")
    mask = flat.tube(8)
    assert (mask.frames, mask.grid, mask.visible) == (8, (14, 14), 160)
    assert torch.equal(mask.hidden.view(4, 8, 196), flat.hidden[:, None].expand(-1, 8, -1))
    assert torch.equal(mask.keep[:, :20], flat.keep)
    assert torch.equal(mask.keep[:, 20:40], flat.keep + 196)
    assert mask.check() is mask
    with pytest.raises(UserError, match=r"Mask\.tube: frames has 8 in the mask, expected 1"):
        mask.tube(2)


def test_tube_of_random_length() -> None:
    flat = Mask.blockwise(6, (14, 14), 98)
    mask = flat.tube(8, (4, 8), sample_ids=torch.arange(6))
    assert mask.hide.shape == (6 * 8 * 98,)
    assert_packed(mask)
    assert torch.equal(mask.hidden, flat.tube(8, (4, 8), sample_ids=torch.arange(6)).hidden)
    assert_packed(Mask.blockwise(6, (14, 14), 98, exact=False).tube(8, (4, 8)))
    assert_packed(Mask.blockwise(6, (14, 14), 98, exact=False).tube(2))
    assert flat.tube(8, (4, 4)).visible == 8 * 196 - 4 * 98
    with pytest.raises(UserError, match=r"Mask.tube: tube has \(4, 9\)"):
        flat.tube(8, (4, 9))


def test_from_hidden_ragged_and_unchecked() -> None:
    mask = Mask.from_hidden(UNEQUAL, ragged=True)
    assert_packed(mask)
    assert mask.cu_seqlens.tolist() == [0, 2, 5]
    with pytest.raises(UserError, match=r"hidden has all 4 tokens hidden, expected .* row 1 shows nothing"):
        Mask.from_hidden(torch.tensor([[True, False, False, False], [True] * 4]), ragged=True)
    equal = Mask.from_hidden(UNEQUAL[:1], visible=2, checked=False)
    assert_consistent(equal)
    with pytest.raises(UserError, match="hidden has 2 hidden tokens in row 0, expected 1 because visible is 3 of 4"):
        Mask.from_hidden(UNEQUAL[:1], visible=3)
    cut = Mask.from_hidden(UNEQUAL, checked=False)
    assert cut.keep.tolist() == [[1, 2], [1, 2]]
    assert cut.hide.tolist() == [[0, 3], [0, -1]]
    with pytest.raises(UserError, match="visible has 2, expected None because ragged rows"):
        Mask.from_hidden(UNEQUAL, ragged=True, visible=2)


def test_from_keep() -> None:
    random = Mask.random(4, (6, 6), 0.5)
    shuffled = random.keep[:, torch.randperm(18)]
    made = Mask.from_keep(shuffled, (6, 6), checked=True)
    for name in ("keep", "inverse", "hidden", "hide"):
        assert torch.equal(getattr(made, name), getattr(random, name))
    bad = torch.tensor([[3, 0, 3], [1, 4, 2], [-1, 2, 9]])
    mask = Mask.from_keep(bad, (2, 2))
    assert mask.keep.tolist() == [[0, 3, -1], [1, 2, -1], [2, -1, -1]]
    assert mask.hidden.tolist() == [[False, True, True, False], [True, False, False, True], [True, True, False, True]]
    for rows, message in (
        (bad[:1], "index 3 twice in row 0, expected distinct indices because a token is visible once"),
        (bad[1:2], "index 4 in row 0, expected 0 to 3 because the grid has 4 tokens"),
        (bad[[1, 2]][1:], "index -1 in row 0, expected 0 to 3"),
        (torch.zeros(1, 5, dtype=torch.int64), "keep has 5 indices, expected at most 4"),
        (bad.int(), "keep has dtype int32, expected int64"),
    ):
        with pytest.raises(UserError, match=f"Mask.from_keep: .*{message}"):
            Mask.from_keep(rows, (2, 2), checked=True)


def test_check_finds_views_that_disagree() -> None:
    mask = Mask.random(3, (4, 4), 0.5)
    for name in ("keep", "hide", "inverse"):
        wrong = getattr(mask, name).clone()
        wrong[1, 0] = wrong[1, 1]
        with pytest.raises(UserError, match=f"Mask.check: {name} is not what `hidden` says"):
            dataclasses.replace(mask, **{name: wrong}).check()
    flipped = mask.hidden.clone()
    flipped[2, 0] ^= True
    with pytest.raises(UserError, match="visible tokens in row 2"):
        dataclasses.replace(mask, hidden=flipped).check()
    with pytest.raises(UserError, match=r"hidden has shape \(3, 16\), expected \(any, 32\)"):
        dataclasses.replace(mask, frames=2).check()
    ragged = Mask.random(2, (4, 4), [0.5, 0.25])
    assert ragged.check() is ragged
    bounds = ragged.cu_seqlens.clone()
    bounds[1] += 1
    with pytest.raises(UserError, match="cu_seqlens is not what"):
        dataclasses.replace(ragged, cu_seqlens=bounds).check()


def test_to_moves_every_view() -> None:
    for mask in (Mask.random(2, (4, 4), 0.5), Mask.random(2, (4, 4), [0.5, 0.25]).tube(2)):
        moved = mask.to("meta")
        assert {t.device.type for t in (moved.keep, moved.inverse, moved.hidden, moved.hide)} == {"meta"}
        assert moved.frames == mask.frames
        assert (moved.cu_seqlens is None) == (mask.cu_seqlens is None)
