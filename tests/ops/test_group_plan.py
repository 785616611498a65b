"""group_plan: both versions agree, windows stay whole, no plan of the published kind is cheaper, bad input."""

from itertools import pairwise

import pytest
import torch

from mimfast._check import UserError
from mimfast.ops import group_plan
from mimfast.ops.group_plan import IMPLS, GroupPlan
from mimfast.testing.group_plan import CASES, knapsacks, make

NATIVE = [name for name in IMPLS if name != "ref"]


def check(plan: GroupPlan, window: torch.Tensor, limit: int) -> None:
    assert plan.slot.unique().numel() == len(window)
    assert plan.slot.min() >= 0
    assert plan.slot.max() < plan.groups * plan.size
    counts = torch.bincount(window)
    assert counts.max() <= plan.size <= max(int(counts.max()), min(limit, len(window)))
    group = plan.slot // plan.size
    assert group.unique().numel() == plan.groups
    for w in window.unique():
        slots = plan.slot[window == w]
        assert len(set(group[window == w].tolist())) == 1
        assert all(b == a + 1 for a, b in pairwise(slots.tolist()))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", NATIVE)
def test_equals_the_reference(case, impl: str) -> None:
    for _ in range(5):
        args = make(case)
        wanted = group_plan(**args, impl="ref")
        found = group_plan(**args, impl=impl, checked=True)
        assert torch.equal(found.slot, wanted.slot)
        assert found[1:] == wanted[1:]
        check(found, args["window"], args["limit"])


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_never_costs_more_than_the_published_rule(case) -> None:
    for _ in range(5):
        args = make(case)
        plan, (_, groups, size) = group_plan(**args), knapsacks(**args)
        cost, published = (n * s * (s + args["overhead"]) for n, s in ((plan.groups, plan.size), (groups, size)))
        assert cost <= published


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: str) -> None:
    window = torch.tensor([4, 0, 4, 2, 4, 2, 7, 4])  # lengths 1, 2, 4, 1
    plan = group_plan(window, 8, 4, overhead=0, impl=impl)
    assert plan[1:] == (2, 4)
    assert plan.slot.tolist() == [0, 4, 1, 5, 2, 6, 7, 3]
    # moving slots costs more than pairs: one group
    assert group_plan(window, 8, 8, overhead=10**6, impl=impl)[1:] in [(2, 4), (1, 8)]
    assert group_plan(torch.tensor([0] * 5 + [1] * 3 + [2]), 3, 9, overhead=100, impl=impl)[1:] == (1, 9)
    assert group_plan(torch.tensor([3]), 4, 1, impl=impl) == (torch.tensor([0]), 1, 1)
    assert group_plan(torch.arange(200), 200, 98, overhead=1, impl=impl)[1:] == (200, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_across_words(impl: str) -> None:
    lengths = [63, 64, 65, 1, 127, 128, 2, 30]
    window = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths))[torch.randperm(sum(lengths))]
    plan = group_plan(window, 8, 128, overhead=0, impl=impl)
    assert plan[1:] == (4, 128)
    check(plan, window, 128)


def test_refuses() -> None:
    window = torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"group_plan: window has no token, expected 1 or more"):
        group_plan(window[:0], 2, 4)
    with pytest.raises(UserError, match=r"group_plan: window has dtype int32, expected"):
        group_plan(window.int(), 2, 4)
    with pytest.raises(UserError, match=r"group_plan: window has .*shape|group_plan: window has \(1, 2\)"):
        group_plan(window[None], 2, 4)
    with pytest.raises(UserError, match=r"group_plan: window has device meta, expected the CPU because a plan decides"):
        group_plan(window.to("meta"), 2, 4)
    with pytest.raises(UserError, match=r"group_plan: limit has 0, expected 1 or more"):
        group_plan(window, 2, 0)
    with pytest.raises(UserError, match=r"group_plan: window has values from 0 to 1, expected 0 to 0"):
        group_plan(window, 1, 4, checked=True)
    with pytest.raises(UserError, match=r"group_plan: impl has 'cuda', expected one of"):
        group_plan(window, 2, 4, impl="cuda")
