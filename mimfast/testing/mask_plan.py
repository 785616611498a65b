"""Cases of mask_plan, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    batch: int
    grid: tuple[int, int]
    ratio: float
    unit: int = 1
    rounding: str = "keep_floor"

    def __str__(self) -> str:
        rule = "" if self.rounding == "keep_floor" else f"-{self.rounding}"
        return f"{self.batch}x{self.grid[0]}x{self.grid[1]}-{self.ratio:g}-unit{self.unit}{rule}"


# MAE at 224 px; SimMIM's 32 px units on 4 px tokens of 192 px; one token; nothing hidden; all but one hidden; odd
# sizes; more units than one warp takes; as many as the largest block takes; no sample
CASES = [
    Case(5, (14, 14), 0.75),
    Case(3, (48, 48), 0.6, 8, "hide_ceil"),
    Case(2, (1, 1), 0.0),
    Case(3, (7, 5), 0.0),
    Case(3, (7, 5), 0.97),
    Case(4, (15, 9), 0.7, 3),
    Case(3, (14, 14), 0.65, 2, "hide_ceil"),
    Case(2, (16, 17), 0.5),
    Case(2, (33, 31), 0.9),
    Case(1, (64, 128), 0.75),
    Case(0, (14, 14), 0.75),
]

BENCH = [Case(b, (14, 14), 0.75) for b in (64, 256, 4096)] + [
    Case(128, (48, 48), 0.6, 8, "hide_ceil"),
    Case(256, (32, 32), 0.75),
]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of mask_plan for one case: scattered sample ids up to 2^62, a large seed, an epoch per sample."""
    ids = torch.randint(2**62, (case.batch,), device=device)
    epochs = torch.randint(1000, (case.batch,), device=device)
    return case._asdict() | {"sample_ids": ids, "epoch": epochs, "seed": 2**64 - 59}
