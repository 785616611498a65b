"""Swin over the visible tokens alone: windows that lost tokens share groups of equal length. Mode "drop".

GreenMIM, arXiv:2205.13515, section 3. All images of a batch have one mask; which tokens attend to each other is
planned on the CPU, while the GPU is busy with the step before, and travels in the mask (`PlannedMask`). The tokens of a
visible unit (a token of the last map) lie together, and inside it the four that become one lie together at every level,
so that merging neighbours moves nothing.
B batch, T visible tokens of a map, G groups of N slots, h heads of d channels, w window side, R rows of a bias table
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mimfast._check import fail
from mimfast.mask import Mask
from mimfast.ops.group_plan import group_plan


class Place(NamedTuple):
    """Where the blocks of a stage work: the map in tokens, its window, the shift of every second block."""

    size: tuple[int, int]
    window: int
    shift: int


class Groups(NamedTuple):
    """Who attends to whom in one map, with or without the shift. All int64; vectors are rows of d values.

    A slot without a token reads that of token 0.
    """

    row: Tensor  # (G, N, N), row of the bias table of (query, key); R: not in one window; R + 1: no tokens
    there: Tensor  # (3, G, h, N), of (T, 3, h) the vector that comes to each slot
    back: Tensor  # (T, 3, h), of (3, G, h, N) the vector of each token
    out: Tensor  # (T, h), of (G, h, N) the result of each token
    spread: Tensor  # (G, h, N), of (T, h) the result of each slot


@dataclass(frozen=True, eq=False)
class PlannedMask(Mask):
    """The same mask for every image of a batch, with what a Swin in mode "drop" needs of it. Made by `Swin.plan`.

    Attributes:
        places: map, window and shift of each stage that it was planned for.
        patches: (T) int64, the visible patches in the order of the tokens.
        groups: for each stage those without the shift and with it (None where no block is shifted).
        the others: those of `Mask`.
    """

    places: tuple[Place, ...] = ()
    patches: Tensor | None = None
    groups: tuple[tuple[Groups, Groups | None], ...] = ()

    def to(self, device: torch.device | str) -> "PlannedMask":
        """The same mask and plan on another device, in one copy that a GPU does not make the host wait for."""
        assert self.patches is not None  # only `plan` makes one
        tensors = [self.patches, *(t for pair in self.groups for groups in pair if groups for t in groups)]
        tensors += [t[:1] for t in (self.keep, self.inverse, self.hide)]
        flat = torch.cat([t.flatten() for t in tensors])
        if torch.device(device).type == "cuda" and flat.device.type == "cpu":
            flat = flat.pin_memory()
        parts = flat.to(device, non_blocking=True).split([t.numel() for t in tensors])
        moved = iter([part.view(t.shape) for part, t in zip(parts, tensors)])
        patches = next(moved)
        groups = tuple(
            tuple(None if found is None else Groups(*(next(moved) for _ in found)) for found in pair)
            for pair in self.groups
        )
        keep, inverse, hide = (t.expand(len(self.keep), -1) for t in moved)
        return PlannedMask(
            keep, inverse, inverse >= keep.shape[1], self.grid, hide, None, self.frames, self.places, patches,
            groups,  # type: ignore[arg-type]
        )  # fmt: skip


def plan(op: str, mask: Mask, places: Sequence[Place], depths: Sequence[int], heads: Sequence[int]) -> PlannedMask:
    """The mask with its plan.

    Args:
        op: whose, for messages.
        mask: on the CPU, over the last map, the same for every image.
        places: of the stages.
        depths: blocks of each stage.
        heads: attention heads of each stage.
    Raises:
        UserError: a mask of another grid or device, or one that differs from image to image.
    """
    _check(op, mask, places[-1].size)
    keep_K, columns = mask.keep[0], mask.grid[1]
    groups, patches = [], None
    for i, place in enumerate(places):
        levels = len(places) - 1 - i
        down, right = inside(levels)
        y_T = ((keep_K // columns << levels)[:, None] + down).flatten()
        x_T = ((keep_K % columns << levels)[:, None] + right).flatten()
        patches = y_T * place.size[1] + x_T if patches is None else patches
        shifted = place.shift and depths[i] > 1
        plain = _groups(y_T, x_T, place._replace(shift=0), heads[i])
        groups.append((plain, _groups(y_T, x_T, place, heads[i]) if shifted else None))
    return PlannedMask(
        mask.keep, mask.inverse, mask.hidden, mask.grid, mask.hide, None, mask.frames, tuple(places), patches,
        tuple(groups),
    )  # fmt: skip


def _check(op: str, mask: Mask, grid: tuple[int, int]) -> None:
    if mask.grid != grid:
        found, wanted = (f"grid {rows}x{columns}" for rows, columns in (mask.grid, grid))
        fail(op, "mask", found, wanted, "a token of the last map is visible or hidden as a whole")
    if mask.keep.device.type != "cpu":
        because = "groups are planned on the CPU, where nothing waits: plan(mask).to(device)"
        fail(op, "mask", f"device {mask.keep.device}", "the CPU", because)
    same = mask.cu_seqlens is None and (mask.keep.stride(0) == 0 or bool((mask.keep == mask.keep[:1]).all()))
    if not same:
        because = "one plan of groups serves the whole batch"
        fail(op, "mask", "rows that differ", "the same mask for every image, as Mask.expand gives", because)


@lru_cache(maxsize=8)
def inside(levels: int) -> tuple[Tensor, Tensor]:
    """Row and column of the 4^levels tokens of a unit in their order: (0,0), (1,0), (0,1), (1,1) at every level."""
    place = torch.arange(4**levels, device="cpu")
    row, column = torch.zeros_like(place), torch.zeros_like(place)
    for level in range(levels):
        row |= (place >> 2 * level & 1) << level
        column |= (place >> 2 * level + 1 & 1) << level
    return row, column


def _groups(y_T: Tensor, x_T: Tensor, place: Place, heads: int) -> Groups:
    size, w, shift = place
    ahead = (w - shift) % w  # the shift moves the windows, not the tokens
    down, across = ((side + ahead - 1) // w + 1 for side in size)
    window_T = (y_T + ahead) // w * across + (x_T + ahead) // w
    # GreenMIM: up to twice a window's tokens, it may be one group
    slot_T, groups, length = group_plan(window_T, down * across, 2 * w * w)
    there_GN = slot_T.new_full((groups * length,), -1).scatter_(0, slot_T, torch.arange(len(slot_T))).view(groups, -1)
    empty_GN, there_GN = there_GN < 0, there_GN.clamp(min=0)
    window_GN = torch.where(empty_GN, -1, window_T[there_GN])
    y_GN, x_GN, rows = y_T[there_GN], x_T[there_GN], (2 * w - 1) ** 2
    row_GNN = _apart(y_GN) + w - 1
    row_GNN = row_GNN * (2 * w - 1) + _apart(x_GN) + w - 1
    row_GNN = torch.where(_apart(window_GN) == 0, row_GNN, rows)
    row_GNN = torch.where(empty_GN[:, :, None] & empty_GN[:, None], rows + 1, row_GNN)
    # sorted as attention wants them, so that one copy brings them there
    part, head = torch.arange(3), torch.arange(heads)
    there_3GhN = (there_GN[:, None] * 3 + part[:, None, None, None]) * heads + head[:, None]
    out_Th = ((slot_T // length)[:, None] * heads + head) * length + (slot_T % length)[:, None]
    back_T3h = part[:, None] * (groups * heads * length) + out_Th[:, None]
    return Groups(row_GNN, there_3GhN, back_T3h, out_Th, there_GN[:, None] * heads + head[:, None])


def _apart(at_GN: Tensor) -> Tensor:
    return at_GN[:, :, None] - at_GN[:, None]


def attend_in_groups(qkv: Tensor, table: Tensor, groups: Groups) -> Tensor:
    """Attention inside windows of visible tokens.

    Args:
        qkv: (B, T, 3 C), packed [q | k | v].
        table: (R, h), bias of each offset.
        groups: of this map, shift and number of heads.
    Returns:
        (B, T, C), heads merged.
    """
    (B, T, E), (G, h, N) = qkv.shape, groups.spread.shape
    x = Moved.apply(qkv.view(B, T * 3 * h, -1), groups.there.flatten(), groups.back.flatten())
    q, k, v = x.view(B, 3, G * h, N, -1).unbind(1)
    ends = table.new_full((1, h), float("-inf")), table.new_zeros(1, h)
    bias_GNNh = F.embedding(groups.row, torch.cat([table, *ends]))
    bias = bias_GNNh.permute(0, 3, 1, 2).reshape(1, G * h, N, N).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, bias).flatten(1, 2)
    return Moved.apply(out, groups.out.flatten(), groups.spread.flatten()).view(B, T, E // 3)


class Moved(torch.autograd.Function):
    """Rows of (B, S, d) picked by `there`, with a gradient that is picked by `back` and never added up.

    Slots without a token repeat a row on the way there and get its gradient on the way back. They attend to each other
    only, with a bias that is no parameter, so that neither reaches anything.
    """

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(1, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.index_select(1, *ctx.saved_tensors), None, None
