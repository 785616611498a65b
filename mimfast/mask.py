"""The mask of a batch: which tokens the encoder sees.

B batch, L tokens, K kept tokens, M hidden tokens of an image, S tokens of one slice of a video
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from mimfast._check import UserError, check_dtype, check_shape, fail
from mimfast.ops import _masks
from mimfast.ops._masks import MaskPlan, Rounding
from mimfast.ops.mask_blockwise import mask_blockwise
from mimfast.ops.mask_guided import mask_guided
from mimfast.ops.mask_pack import mask_pack
from mimfast.ops.mask_plan import mask_plan


@dataclass(frozen=True, eq=False)
class Mask:
    """Views of one mask over a grid of tokens in row-major order, slice after slice for a video.

    Every image keeps the same number of tokens, or `cu_seqlens` is set and the two lists hold the images one after the
    other. Where the device alone knows the counts (`blockwise` with exact=False, `tube` with a length), the lists have
    fixed capacities, and -1 stands behind the last image.

    Attributes:
        keep: (B, K) int64, indices of the visible tokens, ascending in each image; (T,) when packed.
        inverse: (B, L) int64, the place of each token in the order [visible ascending, hidden ascending] of its image.
        hidden: (B, L) bool, True = hidden from the encoder.
        grid: (rows, columns) of one slice, with frames * rows * columns = L.
        hide: (B, M) int64, indices of the hidden tokens, ascending in each image; (N,) when packed.
        cu_seqlens: None, or (B + 1) int32: where the visible tokens of each image begin in `keep`, and the end.
        frames: slices of a video; 1 for images.
    """

    keep: Tensor
    inverse: Tensor
    hidden: Tensor
    grid: tuple[int, int]
    hide: Tensor
    cu_seqlens: Tensor | None = None
    frames: int = 1

    @classmethod
    def random(
        cls,
        batch: int,
        grid: tuple[int, int],
        ratio: float | Sequence[float],
        *,
        unit: int = 1,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        rounding: Rounding = "keep_floor",
        device: torch.device | str | None = None,
    ) -> Mask:
        """Draw a random mask, a pure function of (seed, epoch, sample id): see `mimfast.ops.mask_plan`.

        Args:
            batch: B.
            grid: (rows, columns) in tokens.
            ratio: share of hidden units, in [0, 1); a sequence has one for each image and gives a packed mask.
            unit: side of a square mask unit in tokens.
            sample_ids: (B,) int64. None draws fresh ones from torch's generator of `device`, so that every call gives
                another mask and `torch.manual_seed` repeats them.
            seed: of the run.
            epoch: an int or (B,) int64.
            rounding: of U units, "keep_floor" keeps int(U (1 - ratio)) (MAE); "hide_floor" hides int(U ratio)
                (VideoMAE), "hide_ceil" ceil(U ratio) (SimMIM), "hide_round" round(U ratio) (MaskFeat).
            device: of the result.
        """
        sample_ids = _ids(batch, device) if sample_ids is None else sample_ids
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
        return cls._of(plan, grid)

    @classmethod
    def guided(
        cls,
        importance: Tensor,
        grid: tuple[int, int],
        ratio: float | Sequence[float],
        *,
        unit: int = 1,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        rounding: Rounding = "keep_floor",
        checked: bool = False,
    ) -> Mask:
        """Draw a mask that shows important units more often (MILAN): see `mimfast.ops.mask_guided`.

        Args:
            importance: (B, U) weights >= 0, for example the attention of the class token to each patch.
            checked: raise when a weight is negative or not finite; waits for the device.
            grid, ratio, unit, sample_ids, seed, epoch, rounding: as in `random`.
        """
        sample_ids = _ids(len(importance), importance.device) if sample_ids is None else sample_ids
        plan = mask_guided(
            importance,
            grid,
            ratio,
            unit=unit,
            sample_ids=sample_ids,
            seed=seed,
            epoch=epoch,
            rounding=rounding,
            checked=checked,
        )
        return cls._of(plan, grid)

    @classmethod
    def blockwise(
        cls,
        batch: int,
        grid: tuple[int, int],
        count: int,
        *,
        exact: bool = True,
        min_block: int = 16,
        aspect: tuple[float, float] = (0.3, 1 / 0.3),
        frames: int = 1,
        tube: tuple[int, int] | None = None,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Mask:
        """Hide `count` tokens in random rectangles (BEiT v2), or at most `count` with exact=False (BEiT, EVA).

        For the arguments see `mimfast.ops.mask_blockwise`; sample_ids as in `random`.
        """
        sample_ids = _ids(batch, device) if sample_ids is None else sample_ids
        plan = mask_blockwise(
            batch, grid, count, exact=exact, min_block=min_block, aspect=aspect, frames=frames, tube=tube,
            sample_ids=sample_ids, seed=seed, epoch=epoch, device=device,
        )  # fmt: skip
        return cls._of(plan, grid, frames)

    @classmethod
    def from_hidden(
        cls,
        hidden: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        ragged: bool = False,
        visible: int | None = None,
        checked: bool = True,
    ) -> Mask:
        """Make a mask from a given map.

        Args:
            hidden: (B, L) bool in row-major order, True = hidden from the encoder.
            grid: (rows, columns); None means square.
            ragged: rows may hide different numbers of tokens; the mask is packed.
            visible: K, when it is known. Otherwise it is read from the device, once.
            checked: hold every row against the first one, or against visible; reads the counts back to the host. With
                False, rows that differ are cut or filled up with -1, and nothing waits for the device if visible is
                given.
        Raises:
            UserError: another dtype or shape; rows that hide different numbers of tokens, or all, if checked.
        """
        op = "Mask.from_hidden"
        if hidden.ndim != 2 or 0 in hidden.shape:
            because = "each image has one row with one entry for each token"
            fail(op, "hidden", f"shape {tuple(hidden.shape)}", "(batch, tokens)", because)
        because = "True must mean hidden from the encoder, and numbers are read both ways"
        check_dtype(op, "hidden", hidden, (torch.bool,), because)
        if ragged and visible is not None:
            fail(op, "visible", visible, "None", "ragged rows have no common number of visible tokens")
        grid = _grid_of(hidden.shape[1], grid)
        if checked:
            first = _check_counts(op, hidden, ragged, visible)
        elif not ragged and visible is None:
            first = int(hidden[0].sum())
        if not ragged and visible is None:
            visible = hidden.shape[1] - first
        return cls._of(mask_pack(hidden, visible), grid)

    @classmethod
    def from_keep(cls, keep: Tensor, grid: tuple[int, int], *, checked: bool = False) -> Mask:
        """Make a mask from the indices of the visible tokens, in any order.

        Args:
            keep: (B, K) int64, distinct indices below rows * columns.
            grid: (rows, columns).
            checked: raise when an index is out of range or occurs twice; waits for the device. Without it such an index
                is left out, and the list of its image ends in -1.
        """
        op, tokens = "Mask.from_keep", grid[0] * grid[1]
        check_shape(op, "keep", keep, (None, None), "each image has one row of indices")
        check_dtype(op, "keep", keep, (torch.int64,), "it holds indices")
        if keep.shape[1] > tokens:
            fail(
                op,
                "keep",
                f"{keep.shape[1]} indices",
                f"at most {tokens}",
                f"grid {grid[0]}x{grid[1]} has {tokens} tokens",
            )
        if checked:
            _check_indices(op, keep, tokens)
        inside_BK = torch.where(
            (keep >= 0) & (keep < tokens), keep, tokens
        )  # the column past the end takes the bad ones
        hidden_BL = torch.ones(len(keep), tokens + 1, dtype=torch.bool, device=keep.device).scatter(1, inside_BK, False)
        return cls._of(mask_pack(hidden_BL[:, :tokens].contiguous(), keep.shape[1]), (int(grid[0]), int(grid[1])))

    @classmethod
    def _of(cls, plan: MaskPlan, grid: tuple[int, int], frames: int = 1) -> Mask:
        return cls(plan.keep, plan.inverse, plan.hidden, grid, plan.hide, plan.cu_seqlens, frames)

    def tube(
        self,
        frames: int,
        length: tuple[int, int] | None = None,
        *,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
    ) -> Mask:
        """The mask of a video of `frames` slices from the mask of one: the same map in every slice (VideoMAE).

        Args:
            frames: slices, in tokens.
            length: (low, high) masks only a tube of low to high consecutive slices, around the end, from a random start
                (BEVT: (4, 8) of 8). The result is packed unless low = high and every image hides the same number.
            sample_ids, seed, epoch: as in `random`; only read with a length.
        """
        if self.frames != 1:
            fail("Mask.tube", "frames", f"{self.frames} in the mask", 1, "a tube repeats the mask of one slice")
        _masks.check_tube("Mask.tube", frames, length)
        B, slice_tokens = self.hidden.shape
        sample_ids = _ids(B, self.hidden.device) if sample_ids is None else sample_ids
        _masks.check_samples("Mask.tube", B, sample_ids, epoch, self.hidden.device)
        hidden_BL = _masks.tube_hidden(self.hidden, frames, length, sample_ids, seed, epoch)
        low, high = (frames, frames) if length is None else length
        if self.cu_seqlens is not None:
            plan = mask_pack(hidden_BL, most_hidden=high * slice_tokens)
        else:
            hidden = self.hide.shape[1]
            visible = frames * slice_tokens - high * hidden if low == high else None
            plan = mask_pack(hidden_BL, visible, most_hidden=high * hidden)
        return Mask._of(plan, self.grid, frames)

    @property
    def visible(self) -> int:
        """K, the number of tokens each image keeps."""
        if self.cu_seqlens is not None:
            raise UserError("Mask.visible: the images of this mask keep different numbers of tokens; see cu_seqlens")
        return self.keep.shape[1]

    @property
    def hide_cu_seqlens(self) -> Tensor | None:
        """What cu_seqlens is for `keep`, for `hide`: (B + 1) int32, or None when every image hides the same number."""
        if self.cu_seqlens is None:
            return None
        B, tokens = self.hidden.shape
        return torch.arange(B + 1, dtype=torch.int32, device=self.hidden.device) * tokens - self.cu_seqlens

    def expand(self, batch: int) -> Mask:
        """The mask of one image for each of `batch` images: views of its row, nothing is copied."""
        if self.cu_seqlens is not None or self.hidden.shape[0] != 1:
            fail("Mask.expand", "batch", f"{self.hidden.shape[0]} in the mask", 1, "one row is repeated")
        keep, inverse, hidden, hide = (t.expand(batch, -1) for t in (self.keep, self.inverse, self.hidden, self.hide))
        return Mask(keep, inverse, hidden, self.grid, hide, None, self.frames)

    def rows(self, index: Tensor) -> Mask:
        """The masks of other images in the order of `index`, (B,) int64; not of a packed mask."""
        if self.cu_seqlens is not None:
            fail("Mask.rows", "mask", "packed lists", "as many visible tokens in every image", "rows are picked whole")
        keep, inverse, hidden, hide = (t[index] for t in (self.keep, self.inverse, self.hidden, self.hide))
        return Mask(keep, inverse, hidden, self.grid, hide, None, self.frames)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        keep, inverse, hidden, hide = (t.to(device) for t in (self.keep, self.inverse, self.hidden, self.hide))
        return Mask(keep, inverse, hidden, self.grid, hide, cu_seqlens, self.frames)

    def check(self) -> Mask:
        """Return self, or raise UserError when the views are not those of one mask. Waits for the device."""
        rows, cols = self.grid
        tokens = self.frames * rows * cols
        because = f"{self.frames} slices of {rows}x{cols} tokens"
        check_shape("Mask.check", "hidden", self.hidden, (None, tokens), because)
        wanted = mask_pack(self.hidden, None if self.cu_seqlens is not None else self.visible, checked=True, impl="ref")
        for name in ("keep", "hide", "inverse", "cu_seqlens"):
            found, right = getattr(self, name), getattr(wanted, name)
            if found is None:
                continue
            check_dtype("Mask.check", name, found, (right.dtype,), "it holds indices")
            if name in ("keep", "hide") and self.cu_seqlens is not None:  # capacities are free, the tail is -1
                size = int((right >= 0).sum())
                tail = found.new_full((max(0, len(found) - size),), -1)
                right = torch.cat([right[:size], tail])
            if found.shape != right.shape or not torch.equal(found, right):
                raise UserError(f"Mask.check: {name} is not what `hidden` says: expected the indices mask_pack gives")
        return self


def _ids(batch: int, device: torch.device | str | None) -> Tensor:
    return torch.randint(0, 2**62, (batch,), dtype=torch.int64, device=device)


def _check_counts(op: str, hidden: Tensor, ragged: bool, visible: int | None) -> int:
    tokens, counts = hidden.shape[1], hidden.sum(1).tolist()
    wanted = counts[0] if visible is None else tokens - visible
    for b, count in enumerate(counts):
        if count != wanted and not ragged:
            why = f"row 0 hides {wanted}" if visible is None else f"visible is {visible} of {tokens}"
            raise UserError(
                f"{op}: hidden has {count} hidden tokens in row {b}, expected {wanted} "
                f"because {why} and the kept tokens of a batch form one rectangular tensor (or pass ragged=True)"
            )
        if count == tokens:
            because = f"the encoder must see something, and row {b} shows nothing"
            fail(op, "hidden", f"all {count} tokens hidden", "at least one visible token", because)
    return counts[0]


def _check_indices(op: str, keep: Tensor, tokens: int) -> None:
    for b, row in enumerate(keep.tolist()):
        bad = next((i for i in row if not 0 <= i < tokens), None)
        if bad is not None:
            fail(op, "keep", f"index {bad} in row {b}", f"0 to {tokens - 1}", f"the grid has {tokens} tokens")
        if len(set(row)) != len(row):
            twice = next(i for i in row if row.count(i) > 1)
            fail(op, "keep", f"index {twice} twice in row {b}", "distinct indices", "a token is visible once")


def _grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = isqrt(tokens)
    if grid is None:
        if side * side != tokens:
            wanted, because = "a square number, or grid=(rows, columns)", f"{tokens} is not a square"
            fail("Mask.from_hidden", "hidden", f"{tokens} tokens", wanted, because)
        return (side, side)
    if grid[0] * grid[1] != tokens:
        wanted = str(grid[0] * grid[1])
        fail("Mask.from_hidden", "hidden", f"{tokens} tokens", wanted, f"grid {grid[0]}x{grid[1]} has {wanted} tokens")
    return (int(grid[0]), int(grid[1]))
