"""Cases of mask_guided, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    batch: int
    grid: tuple[int, int]
    ratio: float | tuple[float, ...]
    unit: int = 1
    kind: str = "attention"  # how the weights look; see `weights`
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        ratio = "mixed" if isinstance(self.ratio, tuple) else f"{self.ratio:g}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.grid[0]}x{self.grid[1]}-{ratio}-unit{self.unit}-{self.kind}-{dtype}"


CASES = [
    Case(5, (14, 14), 0.75),
    Case(3, (14, 14), 0.75, dtype=torch.bfloat16),
    Case(4, (16, 16), (0.75, 0.5, 0.9, 0.0)),
    Case(3, (7, 5), 0.5, kind="odd"),
    Case(2, (12, 8), 0.6, 2, kind="zeros"),
    Case(2, (33, 31), 0.9, kind="equal"),
    Case(1, (64, 128), 0.75, kind="wide"),
    Case(2, (1, 1), 0.0),
    Case(0, (14, 14), 0.75),
]

BENCH = [Case(b, (14, 14), 0.75) for b in (64, 256)] + [Case(256, (32, 32), 0.75)]


def weights(kind: str, batch: int, units: int) -> torch.Tensor:
    """attention: softmax of normal logits; wide: 60 orders of magnitude; zeros: most are; odd: every special float."""
    normal = torch.randn(batch, units)
    if kind == "equal":
        return torch.full((batch, units), 0.25)
    if kind == "wide":
        return 10 ** (30 * normal.tanh())
    if kind == "zeros":
        return normal.relu() * (torch.rand(batch, units) < 0.4)
    found = normal.softmax(1)
    if kind == "odd":
        special = torch.tensor([0.0, -0.0, -1.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1e-38, 3e38, 1.0])
        found[:, : len(special)] = special[:units]
    return found


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of mask_guided for one case."""
    units = case.grid[0] * case.grid[1] // case.unit**2
    importance = weights(case.kind, case.batch, units).to(device, case.dtype)
    ids = torch.randint(2**62, (case.batch,), device=device)
    epochs = torch.randint(1000, (case.batch,), device=device)
    args = {"importance": importance, "grid": case.grid, "ratio": case.ratio, "unit": case.unit}
    return args | {"sample_ids": ids, "epoch": epochs, "seed": 2**64 - 59}
