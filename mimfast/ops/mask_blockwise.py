"""Block-wise masking: random rectangles hide a share of the grid. A pure function of (seed, epoch, sample id).

Bao et al., "BEiT: BERT pre-training of image transformers", arXiv:2106.08254, algorithm 1; with exact=True the count is
forced as in the code of BEiT v2 (arXiv:2208.06366). One round makes up to ten tries to place a rectangle, with `room`
cells still to hide:

    area ~ U(min_block, room), log(height / width) ~ U(log aspect bounds), sides rounded from sqrt(area * aspect) and
    sqrt(area / aspect), both strictly smaller than the grid, top and left uniform; taken if it adds 1 .. room cells.

The first try that is taken ends the round; a round without one ends the mask, and so does room = 0. Hence at most
`count` cells are hidden, often fewer. exact=True then hides the missing cells one by one, at random. Try t of round k
reads words 4 * (10 k + t) .. + 3 of the block stream (area, aspect, top, left), cell u of the filling word u of the
mask stream.

All of it is integer arithmetic (area in 12, aspect in 20 fractional bits) but for one exact square root, so that every
implementation gives the same bits.

B samples, H rows, W columns, L = H * W cells, N tries of a round.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import fail
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._masks import MaskPlan, address, tube_hidden
from mimfast.ops.mask_pack import mask_pack
from mimfast.philox import STREAM_BLOCK, STREAM_MASK, check_seed, words

IMPLS = ("cuda", "cpu", "ref")
TRIES = 10
MAX_CELLS = 1 << 16
MAX_WORDS_CUDA = 2048  # kMaskBlockwiseMaxWordsCuda in csrc/mask_blockwise.h
EXP2 = (1073745686, 744070390, 259438920, 55531496, 14693065)  # 2^x on [0, 1], Chebyshev fit, times 2^30


def rounded_side(area: Tensor, log_ratio: Tensor) -> Tensor:
    """sqrt(area * 2^log_ratio) to the nearest integer; area times 2^12, log_ratio times 2^24."""
    fraction, whole = log_ratio & 0xFFFFFF, log_ratio >> 24
    series = torch.full_like(fraction, EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        series = coefficient + (series * fraction >> 24)
    four_times = area * (series >> (10 - whole)) >> 30
    return (four_times.double().sqrt().long() + 1) >> 1


def mask_blockwise_ref(
    sample_ids_B: Tensor,
    epoch: int | Tensor,
    rows: int,
    cols: int,
    count: int,
    min_block: int,
    log_low: int,
    log_high: int,
    exact: bool,
    seed: int,
) -> Tensor:
    """The specification, in torch for any device: all samples and tries of a round at once. Returns (B, H, W)."""
    B, device = len(sample_ids_B), sample_ids_B.device
    y_H1, x_W = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    hidden_BHW = torch.zeros(B, rows, cols, dtype=torch.bool, device=device)
    going_B = torch.ones(B, dtype=torch.bool, device=device)
    for k in range(count):  # a round that goes on hides at least one cell
        drawn_BN4 = words(seed, STREAM_BLOCK, epoch, sample_ids_B, 4 * TRIES, 4 * TRIES * k).view(B, TRIES, 4)
        room_B1 = (count - hidden_BHW.sum((1, 2)))[:, None]
        low_B1, high_B1 = room_B1.clamp(max=min_block), room_B1.clamp(min=min_block)
        area_BN = (low_B1 << 12) + ((high_B1 - low_B1) * drawn_BN4[..., 0] >> 20)
        log_ratio_BN = log_low + ((log_high - log_low) * drawn_BN4[..., 1] >> 32)
        height_BN, width_BN = rounded_side(area_BN, log_ratio_BN), rounded_side(area_BN, -log_ratio_BN)
        top_BN = drawn_BN4[..., 2] * (rows - height_BN + 1) >> 32
        left_BN = drawn_BN4[..., 3] * (cols - width_BN + 1) >> 32
        y_BNH1, x_BN1W = y_H1 - top_BN[..., None, None], x_W - left_BN[..., None, None]
        inside_BNHW = (y_BNH1 >= 0) & (y_BNH1 < height_BN[..., None, None])
        inside_BNHW = inside_BNHW & (x_BN1W >= 0) & (x_BN1W < width_BN[..., None, None])
        added_BN = (inside_BNHW & ~hidden_BHW[:, None]).sum((2, 3))
        good_BN = (height_BN < rows) & (width_BN < cols) & (added_BN > 0) & (added_BN <= room_B1)
        going_B = going_B & good_BN.any(1)
        first_B111 = good_BN.int().argmax(1)[:, None, None, None]
        block_BHW = inside_BNHW.take_along_dim(first_B111, 1)[:, 0]
        hidden_BHW = hidden_BHW | block_BHW & going_B[:, None, None]
        if device.type == "cpu" and not going_B.any():  # elsewhere this would wait for the device
            break
    return _fill_up_ref(hidden_BHW, sample_ids_B, epoch, count, seed) if exact else hidden_BHW


def _fill_up_ref(hidden_BHW: Tensor, sample_ids_B: Tensor, epoch: int | Tensor, count: int, seed: int) -> Tensor:
    """Hide the visible cells with the smallest (word, cell) until `count` are hidden."""
    hidden_BL = hidden_BHW.flatten(1)
    cells = hidden_BL.shape[1]
    key_BL = words(seed, STREAM_MASK, epoch, sample_ids_B, cells) << 26 | torch.arange(cells, device=hidden_BL.device)
    key_BL = torch.where(hidden_BL, -1 - key_BL, key_BL)  # the hidden ones come first and stay
    last_B1 = key_BL.sort().values[:, count - 1 : count]
    return (key_BL <= last_B1).view_as(hidden_BHW)


def mask_blockwise(
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
    impl: Impl = "auto",
) -> MaskPlan:
    """Draw one block-wise mask per sample. Bit-identical for every impl and device, and for a sample in any batch.

    Args:
        batch: B.
        grid: (rows, cols) in tokens, at most 2^16 of them.
        count: tokens to hide: 75 of 14 x 14 (BEiT), 78 (MaskFeat), 98 (BEVT), 105 of 16 x 16 (EVA).
        exact: True hides exactly `count` (BEiT v2). False is the original: at most `count`; the lists are packed, with
            hide (B * count,). A mask of the original may in principle hide nothing.
        min_block: least area of a rectangle, at most count.
        aspect: bounds of height / width, within 1/16 to 16.
        frames: T slices of a video that share the mask; L = T * rows * cols, slice after slice.
        tube: (low, high): only a tube of low to high consecutive slices is masked, around the end (BEVT: (4, 8) of 8).
            The counts then differ unless low = high and exact.
        sample_ids, seed, epoch, device: as in mask_plan.
        impl: "auto", "ref", "cpu" (native, CPU tensors) or "cuda" (maps of at most 2048 words of 32 columns). The
            reference makes `count` rounds on a GPU, where it may not look whether all samples are done: slow.
    Returns:
        MaskPlan.
    Raises:
        UserError: a count, min_block, aspect, frames or tube out of range; wrong sample_ids, epoch or seed.
    """
    rows, cols = _masks.check_grid("mask_blockwise", grid)
    _check_sizes(rows * cols, count, min_block, aspect, frames, tube)
    check_seed("mask_blockwise", seed)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    _masks.check_samples("mask_blockwise", batch, sample_ids, epoch, device)
    chosen = resolve("mask_blockwise", impl, IMPLS, partial(_why_not, sample_ids.device.type, rows, cols))
    epochs, epoch_or_0 = _masks.split_epoch(epoch)
    log_low, log_high = (round(math.log2(bound) * (1 << 24)) for bound in aspect)
    hidden_BS = torch.ops.mimfast.mask_blockwise(
        sample_ids,
        epochs,
        epoch_or_0,
        rows,
        cols,
        count,
        min_block,
        log_low,
        log_high,
        exact,
        _masks.signed(seed),
        chosen,
    )
    hidden_BL = hidden_BS if frames == 1 else tube_hidden(hidden_BS, frames, tube, sample_ids, seed, epoch)
    slices = (frames, frames) if tube is None else tube
    visible = frames * rows * cols - slices[0] * count if exact and slices[0] == slices[1] else None
    packing: Impl = "ref" if chosen == "ref" else "auto" if impl == "auto" else impl
    return mask_pack(hidden_BL, visible, most_hidden=slices[1] * count, impl=packing)


def _check_sizes(
    cells: int, count: int, min_block: int, aspect: tuple[float, float], frames: int, tube: tuple[int, int] | None
) -> None:
    op = "mask_blockwise"
    if cells > MAX_CELLS:
        fail(op, "grid", f"{cells} tokens", f"at most {MAX_CELLS}", "areas are held in 28 bits")
    if not 1 <= count < cells:
        fail(
            op, "count", count, f"1 to {cells - 1}", f"the grid has {cells} tokens and the encoder needs a visible one"
        )
    if not 1 <= min_block <= count:
        because = f"blocks smaller than count = {count} are what a mask is built from"
        fail(op, "min_block", min_block, f"1 to {count}", because)
    if not 1 / 16 <= aspect[0] <= aspect[1] <= 16:
        fail(op, "aspect", aspect, "(low, high) with 1/16 <= low <= high <= 16", "it bounds height / width")
    _masks.check_tube(op, frames, tube)


def _why_not(device: str, rows: int, cols: int, impl: str) -> str | None:
    size = rows * -(-cols // 32)
    if impl == "cuda" and size > MAX_WORDS_CUDA:
        return (
            f"the CUDA kernel takes maps of at most {MAX_WORDS_CUDA} words of 32 columns and {rows} x {cols} has {size}"
        )
    return why_not_on(impl, device)


# contract: one schema and one fake; "ref" runs inside it too, because its number of rounds is data
torch.library.define(
    "mimfast::mask_blockwise",
    f"({_masks.SAMPLES}, int rows, int cols, int count, int min_block, int log_low, int log_high, bool exact,"
    " SymInt seed, str impl) -> Tensor",
)


@torch.library.register_fake("mimfast::mask_blockwise")
def _allocate(sample_ids, epochs, epoch, rows, cols, count, min_block, log_low, log_high, exact, seed, impl):  # noqa: ARG001
    return sample_ids.new_empty(sample_ids.shape[0], rows * cols, dtype=torch.bool)


@torch.library.impl("mimfast::mask_blockwise", ("cpu", "cuda"))
def _run(sample_ids, epochs, epoch, rows, cols, count, min_block, log_low, log_high, exact, seed, impl):
    shape = (rows, cols, count, min_block, log_low, log_high, exact)
    if impl == "ref":
        one_or_all = epoch if epochs is None else epochs
        return mask_blockwise_ref(sample_ids, one_or_all, *shape, seed & (1 << 64) - 1).flatten(1)
    hidden = sample_ids.new_empty(len(sample_ids), rows * cols, dtype=torch.bool)
    run_native(_native.core(), impl, sample_ids, epochs, epoch, *shape, seed, hidden)
    return hidden


def run_native(
    core, impl, sample_ids, epochs, epoch, rows, cols, count, min_block, log_low, log_high, exact, seed, hidden
) -> None:
    """Fill `hidden` (B, L) with a native core: mimfast._core, or the emulated one in tests."""
    sample_ids, epochs = sample_ids.contiguous(), None if epochs is None else epochs.contiguous()
    call = core.MaskBlockwise(
        sample_ids=address(sample_ids), epochs=address(epochs), epoch=epoch, batch=len(sample_ids), rows=rows,
        cols=cols, count=count, min_block=min_block, log_low=log_low, log_high=log_high, exact=exact,
        seed=seed & (1 << 64) - 1, hidden=address(hidden),
    )  # fmt: skip
    _masks.launch(core, "mask_blockwise", impl, call, sample_ids.device)
