"""mask_guided: every implementation equals the reference to the bit, and its law is that of torch.multinomial."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast import philox
from mimfast._check import UserError
from mimfast.ops._masks import ALL_BITS, Counts, MaskPlan
from mimfast.ops.mask_guided import IMPLS, mask_guided, mask_guided_ref, minus_log2
from mimfast.ops.mask_plan import mask_plan, run_native
from mimfast.testing import poisoned, skip_unless
from mimfast.testing.mask_guided import CASES, Case, make, weights
from mimfast.testing.mask_plan import assert_same, garbage, native_core

KERNELS = [impl for impl in IMPLS if impl != "ref"]


def run_impl(impl: str, device: str, importance: Tensor, ids: Tensor, epoch, rows, cols, unit, counts, seed, word_mask):
    """A native implementation below the front, which has no word_mask, into memory that holds garbage."""
    core, name = native_core(impl, device)
    lists = garbage(mask_guided_ref(importance, ids, 0, rows, cols, unit, counts, 0)[:4])
    run_native(core, name, ids, None, epoch, rows, cols, unit, counts, seed, lists, word_mask, importance)
    return MaskPlan(*lists, counts.cu_seqlens)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_ref(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with poisoned():
        found = mask_guided(**args, impl=impl)
    assert_same(found, mask_guided(**args, impl="ref"))


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("word_mask", [ALL_BITS, 0x80000001, 0], ids=hex)
@pytest.mark.parametrize("kind", ["attention", "odd", "zeros", "equal", "wide"])
def test_same_bits_for_strange_weights_and_ties(kind, word_mask, impl, device):
    device = "cpu" if impl == "emulated" else device
    for rows, cols, unit, keep_units, batch in [(14, 14, 1, 49, 5), (12, 8, 2, 11, 3), (33, 31, 1, 300, 1)]:
        importance = weights(kind, batch, rows * cols // unit**2).to(device)
        ids = torch.arange(batch, device=device) * 2**40 - 1
        counts = Counts(keep_units, None, keep_units * unit**2)
        args = importance, ids, 3, rows, cols, unit, counts, 2**64 - 1, word_mask
        assert_same(run_impl(impl, device, *args), mask_guided_ref(*args))


def test_minus_log2_is_accurate_and_falls():
    word = torch.cat([torch.arange(0, 5000), 2**32 - 1 - torch.arange(5000), torch.randint(0, 2**32, (100000,))])
    word = torch.cat([word, *(2**k + torch.arange(-2, 3) for k in range(3, 32))]).unique()
    found = minus_log2(word)
    assert found.min() == 1  # units of 2^-33: a race needs times above 0
    exact = torch.tensor([33 - math.log2(2 * w + 1) for w in word.tolist()], dtype=torch.float64) * 2.0**33
    near_one = (2.0**33 - (2 * word + 1).double()) * math.log2(math.e)  # where the logarithm above cancels
    exact = torch.where(word > 2**32 - 2**12, near_one, exact)
    assert ((found - exact).abs() <= 2e-7 * exact + 1).all()
    rises = found.diff().double() / exact[1:]
    assert rises.max() < 2e-7, "falls, but for the error at the joints"


def test_follows_the_rule():
    """The race once more in floating point, from the uniform numbers."""
    args = make(Case(40, (14, 14), 0.75))
    plan = mask_guided(**args)
    v_BU = philox.uniform(args["seed"], philox.STREAM_MASK, args["epoch"], args["sample_ids"], 196)
    gumbel_BU = -(-v_BU.log()).log()
    wanted = (args["importance"].double().log() + gumbel_BU).topk(49).indices.sort().values
    assert (plan.keep == wanted).all(1).float().mean() > 0.99  # but for two times closer than the rounding


def test_the_law_is_that_of_multinomial():
    """How often each unit, and each pair of units, is kept; and with one unit kept, the weights themselves."""
    a_U = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.0, 3.0, 1e-3, 6.0])
    n = 40000
    importance = a_U.expand(n, -1)
    kept = (~mask_guided(importance, (3, 4), 0.5, seed=7).hidden).double()
    drawn = torch.multinomial(importance, 6)
    theirs = torch.zeros(n, 12, dtype=torch.float64).scatter(1, drawn, 1.0)
    assert kept[:, 8].sum() == 0
    assert (kept.mean(0) - theirs.mean(0)).abs().max() < 5 * (0.5 / n) ** 0.5
    assert (kept.T @ kept / n - theirs.T @ theirs / n).abs().max() < 5 * (0.5 / n) ** 0.5
    one = mask_guided(importance, (3, 4), 11 / 12, seed=8, rounding="hide_ceil").keep.flatten()
    expected = n * a_U / a_U.sum()
    seen = one.bincount(minlength=12)
    likely = expected > 5
    chi2 = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi2 < 32, chi2  # 9 or 10 degrees of freedom: 0.05 %


def test_equal_weights_are_plain_random_masking_in_law():
    kept = ~mask_guided(torch.full((20000, 20), 0.3), (4, 5), 0.75, seed=1).hidden
    chi2 = ((kept.sum(0).double() - 5000) ** 2 / 5000).sum() / 0.75 * 19 / 20
    assert 4 < chi2 < 44, chi2  # 19 degrees of freedom: 0.01 % either side


def test_units_without_weight_come_last_and_evenly():
    importance = torch.zeros(20000, 16)
    importance[:, :4] = torch.tensor([1.0, 1e-30, 5.0, 2.0])
    importance[:, 4:7] = torch.tensor([-1.0, torch.nan, -torch.inf])
    kept = ~mask_guided(importance, (4, 4), 0.5, seed=3).hidden
    assert kept[:, :4].all()
    share = kept[:, 4:].double().mean(0)
    assert (share - 4 / 12).abs().max() < 5 * (0.25 / 20000) ** 0.5
    assert (~mask_guided(importance, (4, 4), 0.75, seed=3).hidden)[:, :4].all()
    first = mask_guided(torch.tensor([[1.0, torch.inf, 1e30, 1.0]]).expand(50, -1), (2, 2), 0.75, seed=3)
    assert (first.keep == 1).all()


def test_scale_does_not_matter_and_a_sample_does_not_know_its_batch():
    args = make(Case(6, (14, 14), 0.75))
    whole = mask_guided(**args)
    assert_same(mask_guided(**args | {"importance": args["importance"] * 2.0**-40}), whole)
    part = args | {name: args[name][[4, 1]] for name in ("importance", "sample_ids", "epoch")}
    assert torch.equal(mask_guided(**part).keep, whole.keep[[4, 1]])
    assert not torch.equal(mask_guided(**args | {"seed": 1}).keep, whole.keep)
    assert not torch.equal(mask_guided(**args | {"epoch": 1}).keep, whole.keep)
    plain = mask_plan(6, (14, 14), 0.75, sample_ids=args["sample_ids"], epoch=args["epoch"], seed=args["seed"])
    assert not torch.equal(plain.keep, whole.keep)


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_other_strides_and_gradients(impl, device):
    skip_unless(impl, device)
    attention = torch.rand(3, 37, 37, device=device, requires_grad=True)
    row = attention[:, 0, 1:]  # the class token's, as it comes
    wanted = mask_guided(row.detach().clone(), (6, 6), 0.5, impl="ref")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same(mask_guided(row, (6, 6), 0.5, impl=impl), wanted)
    same = row[:1].detach().expand(3, -1)
    assert_same(mask_guided(same, (6, 6), 0.5, impl=impl), mask_guided(same.clone(), (6, 6), 0.5, impl="ref"))


@pytest.mark.parametrize("impl", KERNELS)
def test_contract(impl, device):
    skip_unless(impl, device)
    ids = torch.arange(4, device=device)
    importance = torch.rand(4, 6, device=device)
    for counts in ((3, None, 12), (0, torch.tensor([0, 4, 12, 16, 40], dtype=torch.int32, device=device), 40)):
        args = importance, ids, None, 0, 6, 4, 2, *counts, -5, impl
        torch.library.opcheck(torch.ops.mimfast.mask_guided, args)


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    compiled = torch.compile(partial(mask_guided, impl=impl), backend="aot_eager", fullgraph=True)
    importance = torch.rand(4, 48, device=device)
    for ratio in (0.75, (0.75, 0.5, 0.25, 0.0)):
        assert_same(compiled(importance, (6, 8), ratio), mask_guided(importance, (6, 8), ratio, impl="ref"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"importance": torch.rand(2, 23)},
            r"mask_guided: importance has shape \(2, 23\), expected \(any, 24\) because a",
        ),
        ({"importance": torch.rand(2, 24).long()}, "importance has dtype int64, expected float32 or"),
        ({"unit": 2}, r"expected \(any, 6\) because a grid of 4 x 6 tokens has 6 mask units of side 2"),
        ({"ratio": 1.0}, r"mask_guided: ratio has 1.0, expected a number in \[0, 1\)"),
        ({"ratio": [0.5]}, "mask_guided: ratio has 1 entries, expected 2"),
        ({"sample_ids": torch.arange(3)}, r"mask_guided: sample_ids has shape \(3,\), expected \(2\)"),
        ({"sample_ids": torch.empty(2, dtype=torch.int64, device="meta")}, "sample_ids has device meta, expected cpu"),
        ({"seed": -1}, "mask_guided: seed has -1"),
        ({"impl": "triton"}, "impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref'"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        mask_guided(**({"importance": torch.rand(2, 24), "grid": (4, 6), "ratio": 0.5} | change))


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf, -math.inf])
def test_checked_names_the_weight(bad):
    importance = torch.rand(3, 24)
    importance[1, 7] = bad
    mask_guided(importance, (4, 6), 0.5)
    message = rf"importance has {bad} at \(1, 7\), expected numbers in \[0, inf\) because weights of a random choice"
    with pytest.raises(UserError, match=message):
        mask_guided(importance, (4, 6), 0.5, checked=True)
    mask_guided(torch.zeros(3, 24), (4, 6), 0.5, checked=True)
