"""The mask of a batch: which tokens the encoder sees.   B batch, L tokens of the grid, K kept tokens"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from mimfast._check import UserError, check_dtype, fail
from mimfast.ops.mask_plan import mask_plan


@dataclass(frozen=True, eq=False)
class Mask:
    """Three views of one mask over a grid of tokens in row-major order. Every image keeps the same number of tokens.

    Attributes:
        keep: (B, K) int64, indices of the visible tokens, ascending.
        inverse: (B, L) int64, the place of each token in the order [visible ascending, hidden ascending]: visible < K.
        hidden: (B, L) bool, True = hidden from the encoder.
        grid: (rows, columns) with rows * columns = L.
    """

    keep: Tensor
    inverse: Tensor
    hidden: Tensor
    grid: tuple[int, int]

    @classmethod
    def random(
        cls,
        batch: int,
        grid: tuple[int, int],
        ratio: float,
        *,
        unit: int = 1,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        rounding: Literal["keep_floor", "hide_ceil"] = "keep_floor",
        device: torch.device | str | None = None,
    ) -> "Mask":
        """Draw a random mask, a pure function of (seed, epoch, sample id): see `mimfast.ops.mask_plan`.

        Args:
            batch: B.
            grid: (rows, columns) in tokens.
            ratio: share of hidden units, in [0, 1).
            unit: side of a square mask unit in tokens.
            sample_ids: (B,) int64. None draws fresh ones from torch's generator of `device`, so that every call gives
                another mask and `torch.manual_seed` repeats them.
            seed: of the run.
            epoch: an int or (B,) int64.
            rounding: "keep_floor" keeps int(U (1 - ratio)) of U units (MAE); "hide_ceil" hides ceil(U ratio) (SimMIM).
            device: of the result.
        """
        if sample_ids is None:
            sample_ids = torch.randint(0, 2**62, (batch,), dtype=torch.int64, device=device)
        plan = mask_plan(
            batch,
            grid,
            ratio,
            unit=unit,
            sample_ids=sample_ids,
            seed=seed,
            epoch=epoch,
            rounding=rounding,
            device=device,
        )
        return cls(plan.keep, plan.inverse, plan.hidden, grid)

    @classmethod
    def from_hidden(cls, hidden: Tensor, grid: tuple[int, int] | None = None) -> "Mask":
        """Make a mask from a given map. Reads the counts back to the host once, to check them.

        Args:
            hidden: (B, L) bool in row-major order, True = hidden from the encoder; every row hides the same number.
            grid: (rows, columns); None means square.
        Raises:
            UserError: another dtype or shape, rows that hide different numbers of tokens, a row that hides all.
        """
        op = "Mask.from_hidden"
        if hidden.ndim != 2 or 0 in hidden.shape:
            fail(
                op,
                "hidden",
                f"shape {tuple(hidden.shape)}",
                "(batch, tokens)",
                "each image has one row with one entry for each token",
            )
        check_dtype(
            op,
            "hidden",
            hidden,
            (torch.bool,),
            "True must mean hidden from the encoder, and numbers are read both ways",
        )
        grid = _grid_of(hidden.shape[1], grid)
        counts = hidden.sum(1).tolist()
        other = next((b for b, n in enumerate(counts) if n != counts[0]), None)
        if other is not None:
            raise UserError(
                f"{op}: hidden has {counts[other]} hidden tokens in row {other}, expected {counts[0]} "
                f"because row 0 hides {counts[0]} and the kept tokens of a batch form one rectangular tensor"
            )
        if counts[0] == hidden.shape[1]:
            fail(
                op,
                "hidden",
                f"all {counts[0]} tokens hidden",
                "at least one visible token",
                "the encoder must see something",
            )
        # stable: both the visible and the hidden ones stay ascending
        order_BL = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        return cls(order_BL[:, : hidden.shape[1] - counts[0]].contiguous(), order_BL.argsort(dim=1), hidden, grid)

    @property
    def visible(self) -> int:
        """K, the number of tokens each image keeps."""
        return self.keep.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on another device."""
        return Mask(self.keep.to(device), self.inverse.to(device), self.hidden.to(device), self.grid)


def _grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = isqrt(tokens)
    if grid is None:
        if side * side != tokens:
            fail(
                "Mask.from_hidden",
                "hidden",
                f"{tokens} tokens",
                "a square number, or grid=(rows, columns)",
                f"{tokens} is not a square",
            )
        return (side, side)
    if grid[0] * grid[1] != tokens:
        wanted = grid[0] * grid[1]
        fail("Mask.from_hidden", "hidden", f"{tokens} tokens", wanted, f"grid {grid[0]}x{grid[1]} has {wanted} tokens")
    return (int(grid[0]), int(grid[1]))
