"""Cases of group_plan, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch

from mimfast.mask import Mask


class Case(NamedTuple):
    side: int  # of the square map in units
    unit: int  # tokens across a unit
    window: int
    shift: int = 0
    ratio: float = 0.75
    overhead: int = 64

    def __str__(self) -> str:
        return f"{self.side}x{self.unit}-w{self.window}-s{self.shift}-{self.ratio}-{self.overhead}"


# the maps of Swin with windows of 7 and 14 on 224 px
CASES = [
    Case(7, unit, window, shift)
    for unit in (8, 4, 2, 1)
    for window in (7, 14)
    for shift in (0, window // 2)
    if shift == 0 or 7 * unit > window
]
CASES += [Case(4, 2, 4, 2, 0.5), Case(4, 2, 4, 1, 0.0, 0), Case(2, 1, 2, 0, 0.7, 0), Case(9, 5, 3, 1, 0.9, 1000)]

BENCH = [Case(7, 8, 7), Case(7, 8, 7, 3), Case(7, 4, 7), Case(7, 8, 14, 7)]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:  # noqa: ARG001 (plans are made on the CPU)
    """The arguments of group_plan for one case, with a random mask."""
    hidden = Mask.random(1, (case.side, case.side), case.ratio).hidden.view(case.side, case.side)
    visible = ~hidden.repeat_interleave(case.unit, 0).repeat_interleave(case.unit, 1)
    y_T, x_T = visible.nonzero().unbind(1)
    ahead = (case.window - case.shift) % case.window
    across = (case.side * case.unit + ahead - 1) // case.window + 1
    window_T = (y_T + ahead) // case.window * across + (x_T + ahead) // case.window
    limit = 2 * case.window**2
    return {"window": window_T, "windows": across * across, "limit": limit, "overhead": case.overhead}


def knapsacks(window: torch.Tensor, windows: int, limit: int, overhead: int) -> tuple[torch.Tensor, int, int]:
    """What the published code does, in Python: the fullest window is the size, one table of sums for each group."""
    del overhead
    counts = [int((window == w).sum()) for w in range(windows)]
    size = min(max(counts), limit)
    left, groups = [w for w in range(windows) if counts[w]], []
    while left:
        best = [[0] * (size + 1) for _ in range(len(left) + 1)]
        for i, w in enumerate(left):
            for room in range(size + 1):
                best[i + 1][room] = best[i][room]
                if counts[w] <= room:
                    best[i + 1][room] = max(best[i][room], best[i][room - counts[w]] + counts[w])
        room, members = size, []
        for i in reversed(range(len(left))):
            if best[i + 1][room] != best[i][room]:
                members.append(left[i])
                room -= counts[left[i]]
        groups.append(members)
        left = [w for w in left if w not in members]
    slot = torch.empty_like(window)
    for g, members in enumerate(groups):
        inside = torch.cat([(window == w).nonzero().flatten() for w in members])
        slot[inside] = g * size + torch.arange(len(inside))
    return slot, len(groups), size
