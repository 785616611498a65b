"""Which windows of visible tokens share a group of attention: as few padded pairs as possible.

GreenMIM, arXiv:2205.13515, section 3.2 ("optimal grouping"). Windows that lost most of their tokens to the mask differ
in length; attention wants groups of one length. Each group takes whole windows: a knapsack of the group's size is
filled with the windows that are left, as full as it goes, until none is left. Of all sizes the one with the smallest
cost is taken: groups * size * (size + overhead), pairs of tokens and slots that are moved.
T visible tokens, W windows, N slots of a group
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_shape, fail
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("cpu", "ref")
OVERHEAD = 64  # pairs that moving a token into its slot and back costs


class GroupPlan(NamedTuple):
    """Where the tokens go: group * size + place in the group."""

    slot: Tensor  # (T) int64, on the CPU
    groups: int
    size: int


def group_plan_ref(window: Tensor, windows: int, limit: int, overhead: int = OVERHEAD) -> GroupPlan:
    count_W = torch.bincount(window, minlength=windows).tolist()
    tokens, longest, best = len(window), max(count_W), None
    for size in range(longest, max(longest, min(limit, tokens)) + 1):
        if best is not None and -(-tokens // size) * size * (size + overhead) >= best[0]:
            continue  # not even full groups would be cheaper
        packed = _pack(count_W, size)
        cost = len(packed) * size * (size + overhead)
        if best is None or cost < best[0]:
            best = (cost, size, packed)
    assert best is not None
    _, size, packed = best
    slot_T = torch.empty(tokens, dtype=torch.int64)
    for g, members in enumerate(packed):
        inside = torch.cat([(window == w).nonzero().flatten() for w in members])
        slot_T[inside] = g * size + torch.arange(len(inside))
    return GroupPlan(slot_T, len(packed), size)


def _pack(count_W: list[int], size: int) -> list[list[int]]:
    """Windows of each group. A sum of lengths that can be reached is a bit; the last windows are taken if they can."""
    left, packed = [w for w, count in enumerate(count_W) if count], []
    while left:
        reached = [1]
        for w in left:
            reached.append((reached[-1] | reached[-1] << count_W[w]) & (2 << size) - 1)
        total, members = reached[-1].bit_length() - 1, []
        for i in reversed(range(len(left))):
            if not reached[i] >> total & 1:
                members.append(left[i])
                total -= count_W[left[i]]
        packed.append(members[::-1])
        left = [w for w in left if w not in members]
    return packed


def group_plan(
    window: Tensor, windows: int, limit: int, *, overhead: int = OVERHEAD, checked: bool = False, impl: Impl = "auto"
) -> GroupPlan:
    """Plan the groups of one map of tokens; on the CPU, while the GPU is busy with the step before.

    Args:
        window: (T,) int64 on the CPU, which window each visible token lies in.
        windows: W, number of windows; those without a token are left out.
        limit: largest size of a group beside that of the fullest window, 1 or more. GreenMIM: twice the tokens of a
            whole window.
        overhead: of the cost, see above.
        checked: raise when a window is not in 0..W-1; the native code would read outside.
        impl: "auto", or one of IMPLS, which then runs or raises. The same plan from both.
    Returns:
        GroupPlan. Tokens of a window lie beside each other, in their order.
    Raises:
        UserError: no token, a window of another shape, dtype or device, numbers out of range.
    """
    op = "group_plan"
    check_dtype(op, "window", window, (torch.int64,), "it holds indices")
    check_shape(op, "window", window, (None,), "it is one number for each visible token")
    if window.device.type != "cpu":
        fail(op, "window", f"device {window.device}", "the CPU", "a plan decides shapes, which the host must know")
    if not len(window):
        fail(op, "window", "no token", "1 or more", "groups are made of visible tokens")
    for name, value, least in (("windows", windows, 1), ("limit", limit, 1), ("overhead", overhead, 0)):
        if value < least:
            fail(op, name, value, f"{least} or more", "it counts windows, tokens or pairs")
    if checked:
        low, high = (int(x) for x in window.aminmax())
        if low < 0 or high >= windows:
            fail(op, "window", f"values from {low} to {high}", f"0 to {windows - 1}", f"there are {windows} windows")
    if resolve(op, impl, IMPLS, partial(why_not_on, device="cpu")) == "ref":
        return group_plan_ref(window, windows, limit, overhead)
    core = _native.core()
    assert core is not None  # or `resolve` would have refused
    slot_T, window = torch.empty_like(window), window.contiguous()
    groups, size = core.group_plan_cpu(window.data_ptr(), len(window), windows, limit, overhead, slot_T.data_ptr())
    return GroupPlan(slot_T, groups, size)
