"""mask_blockwise: every implementation equals the reference to the bit, and the masks look as the papers' do."""

import math
import random
from functools import partial

import pytest
import torch

from mimfast._check import UserError
from mimfast.ops._masks import tube_hidden
from mimfast.ops.mask_blockwise import IMPLS, mask_blockwise, mask_blockwise_ref, rounded_side, run_native
from mimfast.testing import poisoned, skip_unless
from mimfast.testing.mask_blockwise import CASES, Case, make
from mimfast.testing.mask_plan import assert_same, garbage, native_core

KERNELS = [impl for impl in IMPLS if impl != "ref"]
BEIT = (round(math.log2(0.3) * 2**24), round(math.log2(1 / 0.3) * 2**24))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_ref(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with poisoned():
        found = mask_blockwise(**args, impl=impl)
    assert_same(found, mask_blockwise(**args, impl="ref"))


# rows, cols, count, min_block, bounds of aspect: BEiT, EVA, several words per row, one row, rectangles that never fit
SHAPES = [(14, 14, 75, 16, *BEIT), (16, 16, 105, 16, *BEIT), (9, 70, 300, 4, -(4 << 24), 4 << 24),
          (1, 40, 12, 1, *BEIT), (4, 4, 15, 15, 0, 0), (2, 3, 5, 1, 0, 0), (33, 33, 60, 50, -1, 1)]  # fmt: skip


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:3])))
def test_same_bits(shape, exact, impl, device):
    device = "cpu" if impl == "emulated" else device
    core, name = native_core(impl, device)
    ids = torch.arange(24, device=device) * 2**33 - 5
    for epochs, epoch in ((None, 2**32 - 1), (ids.flip(0), 0)):
        one_or_all = epoch if epochs is None else epochs
        wanted = mask_blockwise_ref(ids, one_or_all, *shape, exact, 2**64 - 1).flatten(1)
        (found,) = garbage([wanted])
        run_native(core, name, ids, epochs, epoch, *shape, exact, 2**64 - 1, found)
        assert torch.equal(found, wanted)


def test_a_big_batch_takes_threads(device):
    skip_unless("cpu", device)
    wanted = mask_blockwise(3000, (14, 14), 75, seed=3, impl="ref")
    assert_same(mask_blockwise(3000, (14, 14), 75, seed=3, impl="cpu"), wanted)


def test_sides_are_rounded_as_in_real_arithmetic():
    area = torch.rand(20000, dtype=torch.float64) * 250 + 1
    log_ratio = torch.rand(20000, dtype=torch.float64) * 8 - 4
    exact = (area * 2**log_ratio).sqrt()
    found = rounded_side((area * 2**12).long(), (log_ratio * 2**24).long())
    clear = (exact - exact.floor() - 0.5).abs() > 1e-3  # not within the fixed point's error of a half
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], exact.round().long()[clear])


# methods of the papers: cells hidden on average, share of masks with exactly `count`, least of 20000 masks
@pytest.mark.parametrize(
    ("side", "count", "mean", "full", "least"),
    [(16, 105, 104.45, 0.65, 94), (14, 75, 74.47, 0.67, 64), (14, 98, 97.5, 0.70, 88)],
    ids=["EVA", "BEiT", "BEVT"],
)
def test_counts_of_the_ragged_original(side, count, mean, full, least):
    seen = mask_blockwise(20000, (side, side), count, exact=False, seed=11).hidden.sum(1)
    assert seen.max() == count
    assert abs(seen.double().mean() - mean) < 0.06  # the figures have two digits; deviation of the mean is 0.007
    assert abs((seen == count).double().mean() - full) < 0.02
    assert abs(int(seen.min()) - least) <= 5


def plain_mask(side: int, count: int, least: int, rng: random.Random) -> list[list[int]]:
    """The published algorithm in floating point and Python loops, from its description."""
    grid, hidden = [[0] * side for _ in range(side)], 0
    while hidden < count:
        for _ in range(10):
            area = rng.uniform(least, count - hidden)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= side or w >= side:
                continue
            top, left = rng.randint(0, side - h), rng.randint(0, side - w)
            new = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not grid[y][x]]
            if 0 < len(new) <= count - hidden:
                break
        else:
            return grid
        for y, x in new:
            grid[y][x] = 1
        hidden += len(new)
    return grid


def test_the_masks_look_like_the_plain_ones():
    """Where cells are hidden, how long the border of the hidden region is, and the counts, against the plain loop."""
    rng, n = random.Random(5), 3000
    theirs = torch.tensor([plain_mask(14, 75, 16, rng) for _ in range(n)], dtype=torch.float64)
    ours = mask_blockwise(n, (14, 14), 75, exact=False, seed=2).hidden.view(n, 14, 14).double()
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 5 * (0.5 / n) ** 0.5
    for what in (
        lambda m: m.sum((1, 2)),
        lambda m: m.diff(dim=1).abs().sum((1, 2)),
        lambda m: m.diff(dim=2).abs().sum((1, 2)),
    ):
        a, b = what(ours), what(theirs)
        assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / n) ** 0.5
        assert 0.8 < a.std() / b.std() < 1.25
    # blocks, not dust: a random mask of 75 cells has about 172 borders between unlike neighbours
    assert 40 < ours.diff(dim=1).abs().sum((1, 2)).mean() + ours.diff(dim=2).abs().sum((1, 2)).mean() < 90


def test_exact_adds_to_the_original_and_never_takes_away():
    ragged = mask_blockwise(500, (14, 14), 75, exact=False, seed=4)
    exact = mask_blockwise(500, (14, 14), 75, seed=4)
    assert (exact.hidden.sum(1) == 75).all()
    assert (exact.hidden | ~ragged.hidden).all()
    assert exact.keep.shape == (500, 121)
    assert exact.hide.shape == (500, 75)
    assert exact.cu_seqlens is None
    full = ragged.hidden.sum(1) == 75
    assert torch.equal(exact.hidden[full], ragged.hidden[full])
    # nothing fits: all cells are filled in one by one, evenly
    dust = mask_blockwise(20000, (4, 4), 15, min_block=15, seed=1)
    assert (dust.keep.flatten().bincount(minlength=16) - 1250).abs().max() < 5 * 1250**0.5


@pytest.mark.parametrize("impl", ["ref", "auto"])
def test_packed_lists_of_the_original(impl):
    plan = mask_blockwise(40, (14, 14), 75, exact=False, seed=4, impl=impl)
    counts = (~plan.hidden).sum(1)
    assert plan.keep.shape == (40 * 196,)
    assert plan.hide.shape == (40 * 75,)
    assert torch.equal(plan.cu_seqlens.diff(), counts.int())
    total = int(counts.sum())
    assert torch.equal(plan.keep[:total], (~plan.hidden).nonzero()[:, 1])
    assert torch.equal(plan.hide[: 40 * 196 - total], plan.hidden.nonzero()[:, 1])
    assert (plan.keep[total:] == -1).all()
    assert (plan.hide[40 * 196 - total :] == -1).all()


@pytest.mark.parametrize("impl", ["ref", "auto"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_sample_does_not_know_its_batch(impl, exact):
    ids = torch.tensor([3, 2**40, 8, 3, 11])
    call = partial(mask_blockwise, grid=(14, 14), count=75, exact=exact, seed=4, impl=impl)
    whole = call(5, sample_ids=ids, epoch=2).hidden
    for part in ([1], [4, 0], [2, 1, 3, 0]):
        assert torch.equal(call(len(part), sample_ids=ids[part], epoch=2).hidden, whole[part])
    assert torch.equal(whole[0], whole[3])
    epochs = torch.tensor([2, 0, 2, 1, 2])
    assert (call(5, sample_ids=ids, epoch=epochs).hidden == whole).all(1).tolist() == (epochs == 2).tolist()
    assert not (call(5, sample_ids=ids, epoch=2, seed=5).hidden == whole).all(1).any()


def test_tubes_of_a_video():
    n, frames = 4000, 8
    plan = mask_blockwise(n, (14, 14), 98, exact=False, frames=frames, tube=(4, 8), seed=6)
    flat = mask_blockwise(n, (14, 14), 98, exact=False, seed=6).hidden
    slices = plan.hidden.view(n, frames, 196)
    active = slices.any(2)
    assert torch.equal(slices, active[:, :, None] & flat[:, None])
    length = active.sum(1)
    counts = length.bincount(minlength=9)[4:].double()
    assert ((counts - n / 5) ** 2 / (n / 5)).sum() < 24  # 4 degrees of freedom, 0.01 %
    starts = (active & ~active.roll(1, 1))[length < frames]
    assert (starts.sum(1) == 1).all()  # one run, around the end
    share = starts.double().mean(0)
    assert (share - 1 / frames).abs().max() < 5 * (0.11 / len(starts)) ** 0.5
    assert plan.hide.shape == (n * 8 * 98,)
    assert torch.equal(plan.cu_seqlens.diff(), (~plan.hidden).sum(1).int())
    fixed = mask_blockwise(3, (14, 14), 98, frames=8, tube=(4, 4), seed=6)
    assert fixed.cu_seqlens is None
    assert fixed.hide.shape == (3, 4 * 98)
    everywhere = mask_blockwise(3, (14, 14), 98, frames=8, seed=6)
    assert everywhere.hidden.view(3, 8, 196).all(1).sum(1).tolist() == [98] * 3
    assert torch.equal(tube_hidden(flat, 1, None, torch.arange(n), 0, 0), flat)


@pytest.mark.parametrize("impl", [*KERNELS, "ref"])
def test_contract(impl, device):
    skip_unless(impl, device)
    ids = torch.arange(3, device=device)
    for epochs, exact in ((None, True), (ids, False)):
        torch.library.opcheck(torch.ops.mimfast.mask_blockwise, (ids, epochs, 0, 6, 6, 12, 4, *BEIT, exact, -5, impl))


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    compiled = torch.compile(partial(mask_blockwise, impl=impl), backend="aot_eager", fullgraph=True)
    ids = torch.arange(6, device=device) * 2**40
    for kwargs in ({}, {"exact": False, "epoch": ids}, {"exact": False, "frames": 4, "tube": (2, 3)}):
        args = (6, (8, 8), 30)
        kwargs = {"sample_ids": ids} | kwargs
        assert_same(compiled(*args, **kwargs), mask_blockwise(*args, **kwargs, impl="ref"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("impl", ["cuda", "ref"])
def test_graph_capture_with_new_masks_at_each_replay(impl):
    skip_unless(impl, "cuda")
    ids = torch.arange(8, device="cuda")
    call = partial(mask_blockwise, 8, (14, 14), 75, exact=False, frames=2, tube=(1, 2), sample_ids=ids, impl=impl)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    ids.add_(100)
    graph.replay()
    assert_same(captured, mask_blockwise(*call.args, **(call.keywords | {"impl": "ref"})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "mask_blockwise: count has 0, expected 1 to 63 because the grid has 64 tokens"),
        ({"count": 64}, "mask_blockwise: count has 64, expected 1 to 63"),
        ({"min_block": 0}, "min_block has 0, expected 1 to 30 because blocks smaller than count = 30"),
        ({"min_block": 31}, "min_block has 31, expected 1 to 30"),
        ({"aspect": (0.01, 1)}, r"aspect has \(0.01, 1\), expected \(low, high\) with 1/16 <= low <= high <= 16"),
        ({"aspect": (2.0, 1.0)}, r"aspect has \(2.0, 1.0\)"),
        ({"aspect": (math.nan, 1.0)}, r"aspect has \(nan, 1.0\)"),
        ({"frames": 0}, "frames has 0, expected at least 1"),
        ({"frames": 8, "tube": (4, 9)}, r"tube has \(4, 9\), expected \(low, high\) with 1 <= low <= high <= 8"),
        ({"tube": (0, 1)}, r"tube has \(0, 1\), expected \(low, high\) with 1 <= low <= high <= 1"),
        ({"grid": (512, 129)}, "grid has 66048 tokens, expected at most 65536 because areas are held in 28 bits"),
        ({"grid": (0, 8)}, r"mask_blockwise: grid has \(0, 8\), expected two positive ints"),
        ({"seed": -1}, "mask_blockwise: seed has -1"),
        ({"sample_ids": torch.arange(3)}, r"mask_blockwise: sample_ids has shape \(3,\), expected \(2\)"),
        ({"impl": "triton"}, "impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref'"),
        ({"impl": "cuda", "grid": (2049, 3)}, "at most 2048 words of 32 columns and 2049 x 3 has 2049"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        mask_blockwise(**({"batch": 2, "grid": (8, 8), "count": 30} | change))


def test_cases_reach_both_layouts():
    assert {case.exact for case in CASES} == {True, False}
    assert any(case.grid[1] > 64 for case in CASES)
    assert Case(0, (14, 14), 75) in CASES
