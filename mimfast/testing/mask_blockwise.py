"""Cases of mask_blockwise, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    batch: int
    grid: tuple[int, int]
    most: int  # the argument `count`
    exact: bool = True
    min_block: int = 16
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    frames: int = 1
    tube: tuple[int, int] | None = None

    def __str__(self) -> str:
        rule = "exact" if self.exact else "ragged"
        video = f"-{self.frames}slices{self.tube or ''}" if self.frames > 1 else ""
        return f"{self.batch}x{self.grid[0]}x{self.grid[1]}-{self.most}-{rule}-least{self.min_block}{video}"


# BEiT v2 and v1; EVA; MaskFeat; BEVT's tubes; several words per row; rectangles that never fit; thin; no sample
CASES = [
    Case(5, (14, 14), 75),
    Case(5, (14, 14), 75, False),
    Case(4, (16, 16), 105, False),
    Case(3, (14, 14), 78, False),
    Case(3, (14, 14), 98, False, frames=8, tube=(4, 8)),
    Case(2, (14, 14), 98, True, frames=8, tube=(4, 4)),
    Case(2, (14, 14), 98, True, frames=4),
    Case(2, (9, 70), 300, True, 4, (1 / 16, 16)),
    Case(3, (4, 4), 15, True, 15),
    Case(3, (4, 4), 15, False, 15),
    Case(2, (1, 40), 12, True, 1),
    Case(3, (2, 3), 5, True, 1, (1.0, 1.0)),
    Case(0, (14, 14), 75),
    Case(0, (14, 14), 75, False),
]

BENCH = [Case(b, (14, 14), 75) for b in (64, 256)] + [Case(256, (16, 16), 105, False)]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of mask_blockwise for one case."""
    ids = torch.randint(2**62, (case.batch,), device=device)
    epochs = torch.randint(1000, (case.batch,), device=device)
    args = case._asdict()
    return args | {"count": args.pop("most"), "sample_ids": ids, "epoch": epochs, "seed": 2**64 - 59}
