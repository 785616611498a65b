"""What the mask ops share: the result, the rules for counts, the checks, and the reference that turns a map into lists.

B samples, U mask units, L tokens, K kept tokens, M hidden tokens, S tokens of one slice, T slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mimfast._check import check_dtype, check_shape, fail
from mimfast.philox import STREAM_TUBE, words

Rounding = Literal["keep_floor", "hide_floor", "hide_ceil", "hide_round"]
ALL_BITS = 0xFFFFFFFF
MAX_TOKENS = 1 << 26  # a sample has 2^26 words in a stream
SAMPLES = "Tensor sample_ids, Tensor? epochs, SymInt epoch"  # how every schema names the samples


class MaskPlan(NamedTuple):
    """Lists and maps of one mask per sample. Indices ascend within a sample.

    inverse: (B, L) int64, a permutation of each row: kept tokens hold 0 .. K_b - 1, hidden ones K_b .. L - 1, both
        ascending (the ids_restore of MAE).
    hidden: (B, L) bool, True = hidden from the encoder.
    Equal counts: keep (B, K) int64, hide (B, M) int64, cu_seqlens None.
    Differing counts: keep (T,) and hide (N,) int64 hold the samples one after the other and cu_seqlens (B + 1) int32
        says where the kept tokens of each begin; the hidden ones of sample b begin at b * L - cu_seqlens[b]. Where the
        counts are known only on the device, T and N are capacities, and -1 stands behind the last sample's tokens.
    """

    keep: Tensor
    inverse: Tensor
    hidden: Tensor
    hide: Tensor
    cu_seqlens: Tensor | None


class Counts(NamedTuple):
    """How much to keep: `units` of every sample, or by `cu_seqlens` (B + 1) int32 in tokens. `total` is K, or T."""

    units: int
    cu_seqlens: Tensor | None
    total: int


def lists_ref(hidden_BL: Tensor, visible: int | None, most_hidden: int) -> MaskPlan:
    """The lists of a map in traceable torch. visible: K, kept by every row; None: the rows differ, pack the lists.

    A row that keeps another number than `visible` has its lists cut, or filled up with -1. Packed lists have the
    capacities B * L and B * most_hidden; slots behind the last sample hold -1.
    """
    B, tokens = hidden_BL.shape
    kept_rank_BL = (~hidden_BL).cumsum(1) - 1
    hidden_rank_BL = hidden_BL.cumsum(1) - 1
    kept_B1 = tokens - hidden_BL.sum(1, keepdim=True)
    inverse_BL = torch.where(hidden_BL, kept_B1 + hidden_rank_BL, kept_rank_BL)
    token_BL = torch.arange(tokens, device=hidden_BL.device).expand(B, -1)
    if visible is not None:
        order_BL = torch.empty_like(inverse_BL).scatter(1, inverse_BL, token_BL)
        keep_BK = order_BL[:, :visible].masked_fill(token_BL[:, :visible] >= kept_B1, -1)
        place_BM = kept_B1 + token_BL[:, : tokens - visible]
        hide_BM = order_BL.gather(1, place_BM.clamp(max=tokens - 1)).masked_fill(place_BM >= tokens, -1)
        return MaskPlan(keep_BK, inverse_BL, hidden_BL, hide_BM, None)
    cu_seqlens = torch.nn.functional.pad(kept_B1.flatten().cumsum(0), (1, 0))
    kept_before_B1, kept_all = cu_seqlens[:-1, None], cu_seqlens[-1]
    hidden_before_B1 = torch.arange(B, device=hidden_BL.device)[:, None] * tokens - kept_before_B1
    # every token has a slot in both lists: behind the last sample if it does not belong there
    keep_slot_BL = torch.where(hidden_BL, kept_all + hidden_before_B1 + hidden_rank_BL, kept_before_B1 + kept_rank_BL)
    hide_slot_BL = torch.where(
        hidden_BL, hidden_before_B1 + hidden_rank_BL, B * tokens - kept_all + kept_before_B1 + kept_rank_BL
    )
    empty = inverse_BL.new_empty(B * tokens)
    keep = empty.scatter(0, keep_slot_BL.flatten(), token_BL.masked_fill(hidden_BL, -1).flatten())
    hide = empty.scatter(0, hide_slot_BL.flatten(), token_BL.masked_fill(~hidden_BL, -1).flatten())
    return MaskPlan(keep, inverse_BL, hidden_BL, hide[: B * most_hidden].clone(), cu_seqlens.int())


def select_ref(key_BU: Tensor, rows: int, cols: int, unit: int, counts: Counts) -> MaskPlan:
    """Keep the units with the smallest (key, unit); 0 <= key < 2^32."""
    B, units = key_BU.shape
    key_BU = key_BU << 26 | torch.arange(units, device=key_BU.device)
    kept_B1 = torch.full_like(key_BU[:, :1], counts.units)
    if counts.cu_seqlens is not None:
        kept_B1 = (counts.cu_seqlens.diff() // unit**2)[:, None].long()
    last_kept_B1 = key_BU.sort().values.gather(1, kept_B1 - 1)
    hidden_BU = (key_BU > last_kept_B1).view(B, rows // unit, 1, cols // unit, 1)
    hidden_BL = hidden_BU.expand(-1, -1, unit, -1, unit).reshape(B, rows * cols)
    if counts.cu_seqlens is None:
        return lists_ref(hidden_BL, counts.total, 0)
    plan = lists_ref(hidden_BL, None, rows * cols)
    hide = plan.hide[: B * rows * cols - counts.total].clone()
    # not _replace, whose result torch 2.11 cannot give back from a compiled function
    return MaskPlan(plan.keep[: counts.total].clone(), plan.inverse, plan.hidden, hide, counts.cu_seqlens)


def tube_hidden(
    hidden_BS: Tensor, frames: int, length: tuple[int, int] | None, sample_ids_B: Tensor, seed: int, epoch: int | Tensor
) -> Tensor:
    """(B, T * S): one spatial map in every slice of a video (VideoMAE), or only in a tube of consecutive slices (BEVT).

    length = (low, high): the tube covers low to high slices, drawn uniformly, from a uniform start on, around the end.
    Words 0 and 1 of the tube stream: low + floor(word0 * (high - low + 1) / 2^32) slices from floor(word1 * T / 2^32).
    """
    hidden_BTS = hidden_BS[:, None].expand(-1, frames, -1)
    if length is not None:
        word_B2 = words(seed, STREAM_TUBE, epoch, sample_ids_B, 2)
        covered_B1 = length[0] + (word_B2[:, :1] * (length[1] - length[0] + 1) >> 32)
        start_B1 = word_B2[:, 1:] * frames >> 32
        after_start_BT = (torch.arange(frames, device=hidden_BS.device) - start_B1) % frames
        hidden_BTS = hidden_BTS & (after_start_BT < covered_B1)[:, :, None]
    return hidden_BTS.reshape(len(hidden_BS), -1)


def check_grid(op: str, grid: tuple[int, int], unit: int = 1) -> tuple[int, int]:
    if len(grid) != 2 or min(grid) < 1:
        fail(op, "grid", tuple(grid), "two positive ints", "it holds the rows and columns of tokens")
    rows, cols = grid
    if unit < 1 or rows % unit or cols % unit:
        fail(
            op,
            "unit",
            unit,
            f"a divisor of {rows} and {cols}",
            f"whole units must tile the grid of {rows} x {cols} tokens",
        )
    if rows * cols > MAX_TOKENS:
        fail(op, "grid", f"{rows * cols} tokens", f"at most {MAX_TOKENS}", "a sample has 2**26 random words")
    return rows, cols


def count_kept(op: str, units: int, ratio: float, rounding: str) -> int:
    """Units kept of `units`. The formulas, and so their rounding of floats, are those of the methods' code."""
    if not 0 <= ratio < 1:
        fail(op, "ratio", ratio, "a number in [0, 1)", "it is the share of mask units that are hidden")
    if rounding == "keep_floor":  # MAE, FastMIM, MILAN, FCMAE
        kept = int(units * (1 - ratio))
    elif rounding == "hide_floor":  # VideoMAE, MixMIM
        kept = units - int(units * ratio)
    elif rounding == "hide_ceil":  # SimMIM, ConMIM
        kept = units - math.ceil(units * ratio)
    elif rounding == "hide_round":  # MaskFeat; halves go to the even count
        kept = units - round(units * ratio)
    else:
        wanted = "'keep_floor', 'hide_floor', 'hide_ceil' or 'hide_round'"
        fail(op, "rounding", repr(rounding), wanted, "there are these four rules")
    if kept < 1:
        because = f"it leaves {kept} of {units} mask units visible ({rounding}) and the encoder needs one"
        fail(op, "ratio", ratio, "a smaller one", because)
    return kept


def counts_of(
    op: str, batch: int, units: int, area: int, ratio: float | Sequence[float], rounding: str, device: torch.device
) -> Counts:
    """The counts of a call; `area` is tokens per unit. A sequence of ratios always gives the packed layout."""
    if not isinstance(ratio, Sequence):
        kept = count_kept(op, units, ratio, rounding)
        return Counts(kept, None, kept * area)
    if len(ratio) != batch:
        fail(op, "ratio", f"{len(ratio)} entries", batch, f"a sequence holds one ratio per sample and batch is {batch}")
    check_packed_size(op, batch, units * area)
    bounds = [0]
    for one in ratio:
        bounds.append(bounds[-1] + count_kept(op, units, one, rounding) * area)
    if torch.compiler.is_compiling():  # a constant of the graph
        return Counts(0, torch.tensor(bounds, dtype=torch.int32, device=device), bounds[-1])
    return Counts(0, _on_device(tuple(bounds), device), bounds[-1])


@lru_cache(maxsize=64)  # a CUDA-graph capture may not copy from the host; after a first call the bounds are there
def _on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def check_packed_size(op: str, batch: int, tokens: int) -> None:
    if batch * tokens >= 1 << 31:
        fail(op, "batch", f"{batch} x {tokens} tokens", "fewer than 2**31", "cu_seqlens is int32")


def check_tube(op: str, frames: int, length: tuple[int, int] | None) -> None:
    if frames < 1:
        fail(op, "frames", frames, "at least 1", "it counts the slices of a video")
    if length is not None and not 1 <= length[0] <= length[1] <= frames:
        wanted = f"(low, high) with 1 <= low <= high <= {frames}"
        fail(op, "tube", tuple(length), wanted, f"a tube covers some of the {frames} slices")


def check_samples(
    op: str, batch: int, sample_ids: Tensor, epoch: int | Tensor, device: torch.device | str | None
) -> None:
    check_shape(op, "sample_ids", sample_ids, (batch,), f"batch is {batch}")
    check_dtype(op, "sample_ids", sample_ids, (torch.int64,), "all 64 bits of an id enter the counter")
    if device is not None and torch.empty(0, device=device).device != sample_ids.device:
        fail(op, "sample_ids", f"device {sample_ids.device}", device, "nothing is moved silently")
    if isinstance(epoch, Tensor):
        check_shape(op, "epoch", epoch, (batch,), f"a tensor holds one epoch per sample and batch is {batch}")
        check_dtype(op, "epoch", epoch, (torch.int64,), "it enters the counter as an integer")
        if epoch.device != sample_ids.device:
            fail(op, "epoch", f"device {epoch.device}", sample_ids.device, "sample_ids is there")


def split_epoch(epoch: int | Tensor) -> tuple[Tensor | None, int]:
    """The two arguments of a schema that stand for an epoch: one per sample, or one for all."""
    return (epoch, 0) if isinstance(epoch, Tensor) else (None, epoch)


def signed(seed: int) -> int:
    """A seed in [0, 2^64) as the int64 of a schema."""
    return seed if seed < 1 << 63 else seed - (1 << 64)


def allocate_plan(sample_ids: Tensor, tokens: int, kept: int, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty keep, inverse, hidden and hide for counts known on the host; `kept` is K, or T if packed."""
    B = sample_ids.shape[0]
    keep = sample_ids.new_empty((kept,) if packed else (B, kept))
    hide = sample_ids.new_empty((B * tokens - kept,) if packed else (B, tokens - kept))
    return keep, sample_ids.new_empty(B, tokens), sample_ids.new_empty(B, tokens, dtype=torch.bool), hide


def address(tensor: Tensor | None) -> int:
    """data_ptr for the native core, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def launch(core, name: str, impl: str, call, device: torch.device) -> None:
    """Run core.<name>_<impl>(call) with all threads, or on the current stream of the device (emulated: stream 0)."""
    run = getattr(core, f"{name}_{impl}")
    if impl == "cpu":
        run(call, torch.get_num_threads())
    elif device.type == "cuda":
        with torch.cuda.device(device):
            run(call, torch.cuda.current_stream().cuda_stream)
    else:
        run(call, 0)
