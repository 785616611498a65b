"""mask_plan: every implementation equals the reference to the bit, and the reference equals the rule."""

from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mimfast import philox
from mimfast._check import UserError
from mimfast.ops._masks import ALL_BITS, Counts, MaskPlan, Rounding
from mimfast.ops.mask_plan import IMPLS, mask_plan, mask_plan_ref, run_native
from mimfast.testing import poisoned, skip_unless
from mimfast.testing.mask_plan import CASES, Case, assert_same, garbage, make, native_core

KERNELS = [impl for impl in IMPLS if impl != "ref"]


def run_impl(impl: str, device: str, ids: Tensor, epoch, rows, cols, unit, counts, seed, word_mask=ALL_BITS):
    """A native implementation below the front, which has no word_mask, into memory that holds garbage."""
    core, name = native_core(impl, device)
    epochs, epoch = (epoch, 0) if isinstance(epoch, Tensor) else (None, epoch)
    lists = garbage(mask_plan_ref(ids, 0, rows, cols, unit, counts, 0)[:4])
    run_native(core, name, ids, epochs, epoch, rows, cols, unit, counts, seed, lists, word_mask)
    return MaskPlan(*lists, counts.cu_seqlens)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_ref(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with poisoned():
        found = mask_plan(**args, impl=impl)
    assert_same(found, mask_plan(**args, impl="ref"))
    assert all(t.is_contiguous() for t in found[:4])


# rows, cols, unit, kept units: one warp, several warps, the largest block, each also with uneven ends
SHAPES = [(14, 14, 1, 49), (14, 14, 2, 12), (15, 9, 3, 4), (1, 1, 1, 1), (7, 5, 1, 35), (16, 16, 1, 255),
          (257, 1, 1, 3), (31, 33, 1, 300), (64, 64, 2, 1000), (45, 46, 1, 7), (64, 128, 1, 5000)]  # fmt: skip


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("word_mask", [ALL_BITS, 0xC0000001, 1, 0], ids=hex)
def test_ties_go_to_the_lower_unit(word_mask, impl, device):
    """With few bits in a word nearly every boundary is a tie; with none the first units are kept."""
    device = "cpu" if impl == "emulated" else device
    ids = torch.tensor([0, 2**62, 2**63 - 1, -1], device=device)
    for rows, cols, unit, keep_units in SHAPES:
        few = ids if rows * cols < 4096 else ids[:1]
        counts = Counts(keep_units, None, keep_units * unit**2)
        args = few, 7, rows, cols, unit, counts, 2**64 - 1, word_mask
        wanted = mask_plan_ref(*args)
        assert_same(run_impl(impl, device, *args), wanted)
        if word_mask == 0 and unit == 1:
            assert torch.equal(wanted.keep, torch.arange(keep_units, device=device).expand(len(few), -1))


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
def test_big_batch_with_an_epoch_per_sample(impl, device):
    device = "cpu" if impl == "emulated" else device
    ids = torch.arange(3000, device=device).flip(0) * 2**33
    epochs = torch.arange(3000, device=device)
    args = ids[::2], epochs[::2], 14, 14, 1, Counts(49, None, 49), 5
    assert_same(run_impl(impl, device, *args), mask_plan_ref(*args))


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("word_mask", [ALL_BITS, 1], ids=hex)
def test_counts_of_each_sample(word_mask, impl, device):
    """Packed lists: one warp, several warps, the largest block; the first and the last image keep all and one unit."""
    device = "cpu" if impl == "emulated" else device
    for rows, cols, unit, kept_B in [(14, 14, 2, [49, 3, 17, 1]), (33, 31, 1, [1023, 500, 1]), (45, 46, 1, [2070, 7])]:
        bounds = [0]
        for kept in kept_B:
            bounds.append(bounds[-1] + kept * unit**2)
        counts = Counts(0, torch.tensor(bounds, dtype=torch.int32, device=device), bounds[-1])
        ids = torch.arange(len(kept_B), device=device) - 1
        args = ids, 7, rows, cols, unit, counts, 3, word_mask
        wanted = mask_plan_ref(*args)
        assert_same(run_impl(impl, device, *args), wanted)
        for b, kept in enumerate(kept_B):  # each sample alone, with its own count
            alone = mask_plan_ref(ids[b : b + 1], 7, rows, cols, unit, Counts(kept, None, kept * unit**2), 3, word_mask)
            assert torch.equal(wanted.keep[bounds[b] : bounds[b + 1]], alone.keep[0])
            hide = wanted.hide[b * rows * cols - bounds[b] : (b + 1) * rows * cols - bounds[b + 1]]
            assert torch.equal(hide, alone.hide[0])
            assert torch.equal(wanted.inverse[b], alone.inverse[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_follows_the_rule(case):
    """The rule once more in plain Python, from the words."""
    args = make(case)
    plan = mask_plan(**args, impl="ref")
    (rows, cols), unit = case.grid, case.unit
    units = rows * cols // unit**2
    rule = {
        "keep_floor": lambda ratio: int(units * (1 - ratio)),
        "hide_floor": lambda ratio: units - int(units * ratio),
        "hide_ceil": lambda ratio: units - int(np.ceil(units * ratio)),
        "hide_round": lambda ratio: units - int(np.rint(units * ratio)),
    }[case.rounding]
    mixed = isinstance(case.ratio, tuple)
    kept_B = [rule(r) for r in case.ratio] if mixed else [rule(case.ratio)] * case.batch
    word_BU = philox.words(args["seed"], philox.STREAM_MASK, args["epoch"], args["sample_ids"], units).tolist()
    keeps, hides = [], []
    for b, word_U in enumerate(word_BU):
        chosen = set(sorted(range(units), key=lambda u: (word_U[u], u))[: kept_B[b]])
        keep = [t for t in range(rows * cols) if t // cols // unit * (cols // unit) + t % cols // unit in chosen]
        hidden = sorted(set(range(rows * cols)) - set(keep))
        assert plan.hidden[b].nonzero().flatten().tolist() == hidden
        assert plan.inverse[b].argsort().tolist() == keep + hidden
        keeps.append(keep)
        hides.append(hidden)
    assert plan.inverse.shape == plan.hidden.shape == (case.batch, rows * cols)
    if mixed:
        assert plan.keep.tolist() == [t for keep in keeps for t in keep]
        assert plan.hide.tolist() == [t for hide in hides for t in hide]
        assert plan.cu_seqlens.dtype == torch.int32
        assert plan.cu_seqlens.tolist() == np.cumsum([0, *map(len, keeps)]).tolist()
    else:
        assert plan.keep.tolist() == keeps
        assert plan.hide.tolist() == hides
        assert plan.cu_seqlens is None
        kept = rule(case.ratio) * unit**2
        assert plan.keep.shape == (case.batch, kept)
        assert plan.hide.shape == (case.batch, rows * cols - kept)


def test_inverse_restores_what_keep_gathered():
    plan = mask_plan(6, (8, 10), 0.6, unit=2, seed=1)
    x_BL = torch.randn(6, 80)
    visible_BK = x_BL.gather(1, plan.keep)
    filled_BL = torch.cat([visible_BK, torch.zeros(6, 80 - visible_BK.shape[1])], 1).gather(1, plan.inverse)
    assert torch.equal(filled_BL, x_BL.masked_fill(plan.hidden, 0))


@pytest.mark.parametrize("impl", ["ref", "auto"])
def test_a_sample_does_not_know_its_batch(impl):
    ids = torch.tensor([3, 2**40, 8, 3, 11])
    whole = mask_plan(5, (14, 14), 0.75, sample_ids=ids, seed=4, epoch=2, impl=impl)
    for part in ([1], [4, 0], [2, 1, 3, 0]):
        plan = mask_plan(len(part), (14, 14), 0.75, sample_ids=ids[part], seed=4, epoch=2, impl=impl)
        assert_same(plan, MaskPlan(*(t[part] for t in whole[:4]), None))
    assert torch.equal(whole.keep[0], whole.keep[3])
    ratios = mask_plan(
        2, (14, 14), [0.5, 0.75], sample_ids=ids[:2], seed=4, epoch=2, impl=impl
    )  # nor the others' ratios
    assert torch.equal(ratios.inverse[1], whole.inverse[1])
    epochs = torch.tensor([2, 0, 2, 1, 2])
    mixed = mask_plan(5, (14, 14), 0.75, sample_ids=ids, seed=4, epoch=epochs, impl=impl)
    assert (mixed.keep == whole.keep).all(1).tolist() == (epochs == 2).tolist()


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 49), (0.0, 196), (0.6, 78), (0.9, 19), (0.994, 1)])
def test_exact_counts(ratio, kept):
    plan = mask_plan(3, (14, 14), ratio)
    assert plan.keep.shape == (3, kept)
    assert (~plan.hidden).sum(1).tolist() == [kept] * 3
    assert plan.keep.diff().min() > 0 if kept > 1 else True
    assert plan.hide.shape == (3, 196 - kept)
    up = mask_plan(3, (14, 14), ratio, rounding="hide_ceil")
    assert up.hidden.sum(1).tolist() == [int(np.ceil(196 * ratio))] * 3


@pytest.mark.parametrize(
    ("units", "ratio", "rounding", "hidden"),
    [(196, 0.9, "hide_floor", 176), (49, 0.5, "hide_floor", 24), (49, 0.6, "keep_floor", 30),
     (36, 0.6, "hide_ceil", 22), (49, 0.75, "hide_ceil", 37), (196, 0.4, "hide_round", 78),
     (196, 0.75, "keep_floor", 147)],
)  # fmt: skip
def test_published_counts(units, ratio, rounding, hidden):
    """VideoMAE, MixMIM, FCMAE, SimMIM, ConMIM, MaskFeat, MAE."""
    assert mask_plan(1, (units, 1), ratio, rounding=rounding).hide.shape == (1, hidden)


def test_every_position_is_kept_equally_often():
    """Also pairs: the number of images that keep both of two neighbours."""
    plan = mask_plan(40000, (4, 5), 0.75, seed=12, epoch=3)
    kept_BL = ~plan.hidden
    counts = kept_BL.sum(0).double()
    chi2 = ((counts - 10000) ** 2 / 10000).sum() / 0.75 * 19 / 20  # positions of a row are drawn without replacement
    assert 4 < chi2 < 44, chi2  # 19 degrees of freedom: 0.01 % either side
    both = (kept_BL[:, :-1] & kept_BL[:, 1:]).double().mean(0)
    assert (both - 5 * 4 / (20 * 19)).abs().max() < 0.006  # five standard deviations


def test_seeds_and_epochs_change_the_mask():
    base = mask_plan(50, (14, 14), 0.75, seed=0)
    for other in ({"seed": 1}, {"seed": 2**32}, {"seed": 2**63}, {"epoch": 1}):
        plan = mask_plan(50, (14, 14), 0.75, **other)
        assert not (plan.keep == base.keep).all(1).any()
    assert_same(mask_plan(50, (14, 14), 0.75, epoch=2**32), base)  # the low 32 bits of the epoch count
    ids = torch.arange(50) + 2**62
    assert not (mask_plan(50, (14, 14), 0.75, sample_ids=ids).keep == base.keep).all(1).any()


@pytest.mark.parametrize("impl", KERNELS)
def test_contract(impl, device):
    skip_unless(impl, device)
    ids = torch.arange(4, device=device)
    for epochs in (None, ids):
        torch.library.opcheck(torch.ops.mimfast.mask_plan, (ids, epochs, 0, 6, 4, 2, 3, None, 12, -5, impl))
        bounds = torch.tensor([0, 4, 12, 16, 40], dtype=torch.int32, device=device)
        torch.library.opcheck(torch.ops.mimfast.mask_plan, (ids, epochs, 0, 6, 4, 2, 0, bounds, 40, -5, impl))


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    compiled = torch.compile(partial(mask_plan, impl=impl), backend="aot_eager", fullgraph=True)
    ids = torch.arange(6, device=device) * 2**40
    for kwargs in ({"seed": 3}, {"seed": 2**64 - 1, "epoch": 5}, {"epoch": ids}, {"ratio": (0.7, 0.5, 0.1) * 2}):
        kwargs = {"ratio": 0.7} | kwargs
        found = compiled(6, (6, 8), unit=2, sample_ids=ids, **kwargs)
        assert_same(found, mask_plan(6, (6, 8), unit=2, sample_ids=ids, impl="ref", **kwargs))


def test_a_new_epoch_does_not_compile_again(device):
    frames = []

    def count(graph, example_inputs):  # noqa: ARG001
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(mask_plan, backend=count, fullgraph=True)
    ids = torch.arange(3, device=device)
    for epoch in range(20):
        assert_same(
            compiled(3, (6, 8), 0.7, sample_ids=ids, epoch=epoch), mask_plan(3, (6, 8), 0.7, epoch=epoch, device=device)
        )
    assert len(frames) <= 3, len(frames)  # 0, 1, any


def test_other_strides_and_default_device(device):
    ids = torch.arange(20, device=device)
    assert_same(
        mask_plan(10, (6, 6), 0.5, sample_ids=ids[::2], epoch=ids[1::2]),
        mask_plan(10, (6, 6), 0.5, sample_ids=ids[::2].clone(), epoch=ids[1::2].clone(), impl="ref"),
    )
    assert mask_plan(2, (6, 6), 0.5, device=device).keep.device.type == device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stream_and_graph_capture():
    skip_unless("cuda", "cuda")
    ids = torch.arange(8, device="cuda")
    epoch = torch.zeros(8, dtype=torch.int64, device="cuda")
    call = partial(mask_plan, 8, (14, 14), 0.75, sample_ids=ids, epoch=epoch)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = call(impl="cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert_same(on_side, call(impl="ref"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(impl="cuda")
    epoch.fill_(9)
    ids.add_(100)
    graph.replay()
    assert_same(captured, call(impl="ref"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"mask_plan: ratio has 1.0, expected a number in \[0, 1\) because it is the share"),
        ({"ratio": -0.1}, r"mask_plan: ratio has -0.1, expected a number in \[0, 1\)"),
        ({"ratio": float("nan")}, r"mask_plan: ratio has nan, expected a number in \[0, 1\)"),
        (
            {"ratio": 0.999},
            r"ratio has 0.999, expected a smaller one because it leaves 0 of 24 mask units visible \(keep_floor\)",
        ),
        ({"ratio": 0.99, "rounding": "hide_ceil"}, r"leaves 0 of 24 mask units visible \(hide_ceil\)"),
        (
            {"rounding": "round"},
            "rounding has 'round', expected 'keep_floor', 'hide_floor', 'hide_ceil' or 'hide_round'",
        ),
        (
            {"ratio": [0.5]},
            "ratio has 1 entries, expected 2 because a sequence holds one ratio per sample and batch is 2",
        ),
        ({"ratio": [0.5, 0.99]}, "ratio has 0.99, expected a smaller one because it leaves 0 of 24"),
        ({"ratio": [0.5, -1]}, r"ratio has -1, expected a number in \[0, 1\)"),
        (
            {"ratio": [0.0] * 2**9, "batch": 2**9, "grid": (2**11, 2**11)},
            r"expected fewer than 2\*\*31 because cu_seqlens is",
        ),
        (
            {"unit": 4},
            "unit has 4, expected a divisor of 4 and 6 because whole units must tile the grid of 4 x 6 tokens",
        ),
        ({"unit": 0}, "unit has 0, expected a divisor"),
        ({"grid": (0, 6)}, r"grid has \(0, 6\), expected two positive ints"),
        ({"grid": (2**14, 2**13)}, "grid has 134217728 tokens, expected at most 67108864"),
        ({"seed": -1}, r"mask_plan: seed has -1, expected an int in \[0, 2\*\*64\)"),
        ({"seed": 2**64}, "mask_plan: seed has 18446744073709551616"),
        ({"sample_ids": torch.arange(3)}, r"sample_ids has shape \(3,\), expected \(2\) because batch is 2"),
        ({"sample_ids": torch.zeros(2)}, "sample_ids has dtype float32, expected int64 because"),
        (
            {"sample_ids": torch.arange(2), "device": "meta"},
            "sample_ids has device cpu, expected meta because nothing is moved",
        ),
        (
            {"epoch": torch.arange(3)},
            r"epoch has shape \(3,\), expected \(2\) because a tensor holds one epoch per sample",
        ),
        ({"epoch": torch.zeros(2)}, "epoch has dtype float32, expected int64"),
        ({"impl": "triton"}, "impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref'"),
        ({"impl": "cuda", "grid": (128, 65)}, "at most 8192 mask units and the grid has 8320"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        mask_plan(**({"batch": 2, "grid": (4, 6), "ratio": 0.5} | change))


def test_cases_reach_every_kernel():
    units = {case.grid[0] * case.grid[1] // case.unit**2 for case in CASES}
    assert {case.rounding for case in CASES} == set(get_args(Rounding))
    assert min(units) == 1
    assert any(256 < u <= 1024 for u in units)
    assert max(units) == 8192
    assert Case(0, (14, 14), 0.75) in CASES
