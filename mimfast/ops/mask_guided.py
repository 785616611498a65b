"""Guided masking: keep units at random, the important ones more often; a function of (importance, seed, epoch, sample).

Hou et al., "MILAN: masked image pretraining on language assisted representation", arXiv:2208.06049, section 3.3: K
units drawn without replacement with probabilities proportional to importance a (there: attention of the class token to
each patch).

Drawn here as a race (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006): unit u arrives at the
time E_u = -log2(v_u) / a_u with v_u = (word_u + 1/2) / 2^32, word u of the mask stream, and the first K are kept. The
order of the units is that of log a_u + Gumbel noise, so the law is that of torch.multinomial(a, K, replacement=False).

Every implementation gives the same bits: -log2 is integer arithmetic in 33 fractional bits (relative error below 2e-7),
the quotient is one IEEE division in fp64 rounded to fp32, and the bits of that float are the key; equal keys go to the
lower unit. Units without importance (a = 0, negative, NaN, or so small that E overflows fp32) arrive last, in the order
of their words.

B samples, U mask units, L tokens, K kept tokens, T kept tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_shape, fail
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve
from mimfast.ops._masks import ALL_BITS, Counts, MaskPlan, Rounding, select_ref
from mimfast.ops.mask_plan import _why_not, run_native
from mimfast.philox import STREAM_MASK, check_seed, words

IMPLS = ("cuda", "cpu", "ref")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# -log2(1 - t) / t on [0, 1/2], Chebyshev fit, times 2^28; kMinusLog2 in csrc/mask_guided.h
MINUS_LOG2 = (387270443, 193649513, 128517119, 105476003, 14488705, 304857298, -419835780, 459449953)
INFINITY_BITS = 0x7F800000


def minus_log2(word: Tensor) -> Tensor:
    """-log2((word + 1/2) / 2^32) times 2^33, at least 1; int64 in, int64 out, the same on every machine."""
    zeros, shifted = (word == 0).long(), word
    for step in (16, 8, 4, 2, 1):  # leading zeros of 32 bits
        small = shifted < 1 << 32 - step
        shifted = torch.where(small, shifted << step, shifted)
        zeros = zeros + small.long() * step
    # v = 2^-zeros * (1 - t) with 0 < t <= 1/2
    t = (1 << 33) - ((2 * word + 1) << zeros)
    series = torch.full_like(t, MINUS_LOG2[-1])
    for coefficient in MINUS_LOG2[-2::-1]:
        series = coefficient + (series * t >> 33)
    return (zeros << 33) + (series * t >> 28)


def mask_guided_ref(
    importance_BU: Tensor,
    sample_ids_B: Tensor,
    epoch: int | Tensor,
    rows: int,
    cols: int,
    unit: int,
    counts: Counts,
    seed: int,
    word_mask: int = ALL_BITS,
) -> MaskPlan:
    """The specification, in traceable torch for any device."""
    word_BU = words(seed, STREAM_MASK, epoch, sample_ids_B, importance_BU.shape[1]) & word_mask
    time_BU = minus_log2(word_BU).double() * 2.0**-33  # exact
    arrival_BU = (time_BU / importance_BU.double()).float()
    bits_BU = torch.where(importance_BU > 0, arrival_BU, torch.inf).view(torch.int32).long()
    key_BU = torch.where(bits_BU < INFINITY_BITS, bits_BU, INFINITY_BITS | word_BU >> 9)
    return select_ref(key_BU, rows, cols, unit, counts)


def mask_guided(
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
    impl: Impl = "auto",
) -> MaskPlan:
    """Draw one mask per sample that prefers to show what is important. Bit-identical for every impl and device.

    Args:
        importance: (B, U) floating point, one weight >= 0 per mask unit in row-major order; rows need not sum to 1.
            Read as fp32, without gradient. Zero weights are kept last.
        grid: (rows, cols) in tokens; L = rows * cols.
        ratio: share of hidden units, or one for each sample; as in mask_plan.
        unit: side of a square mask unit in tokens. U = L / unit^2.
        sample_ids: (B,) int64 on the device of importance; None stands for 0 .. B - 1.
        seed, epoch, rounding: as in mask_plan.
        checked: raise when a weight is negative or not finite; waits for the device. Without it such a weight counts as
            zero (plus infinity: kept first).
        impl: "auto", "ref", "cpu" (native, CPU tensors) or "cuda" (at most 8192 units).
    Returns:
        MaskPlan.
    Raises:
        UserError: as mask_plan, and for importance of another shape, dtype or device.
    """
    rows, cols = _masks.check_grid("mask_guided", grid, unit)
    check_seed("mask_guided", seed)
    units = rows * cols // unit**2
    because = f"a grid of {rows} x {cols} tokens has {units} mask units of side {unit}"
    check_shape("mask_guided", "importance", importance, (None, units), because)
    check_dtype("mask_guided", "importance", importance, FLOATS, "it is a weight")
    if sample_ids is None:
        sample_ids = torch.arange(len(importance), device=importance.device)
    _masks.check_samples("mask_guided", len(importance), sample_ids, epoch, importance.device)
    importance_BU = importance.detach().float()
    if checked:
        _check_weights(importance_BU)
    counts = _masks.counts_of("mask_guided", len(importance), units, unit**2, ratio, rounding, sample_ids.device)
    chosen = resolve("mask_guided", impl, IMPLS, partial(_why_not, sample_ids.device.type, units))
    if chosen == "ref":
        return mask_guided_ref(importance_BU, sample_ids, epoch, rows, cols, unit, counts, seed)
    epochs, epoch = _masks.split_epoch(epoch)
    keep, inverse, hidden, hide = torch.ops.mimfast.mask_guided(
        importance_BU, sample_ids, epochs, epoch, rows, cols, unit, *counts, _masks.signed(seed), chosen
    )
    return MaskPlan(keep, inverse, hidden, hide, counts.cu_seqlens)


def _check_weights(importance_BU: Tensor) -> None:
    wrong = (~(importance_BU >= 0) | importance_BU.isinf()).nonzero()
    if len(wrong):
        b, u = wrong[0].tolist()
        because = "weights of a random choice are finite and not negative"
        fail("mask_guided", "importance", f"{importance_BU[b, u].item()} at ({b}, {u})", "numbers in [0, inf)", because)


# contract: one schema and one fake; integers have no gradient, so there is no autograd
torch.library.define(
    "mimfast::mask_guided",
    f"(Tensor importance, {_masks.SAMPLES}, int rows, int cols, int unit, int keep_units, Tensor? cu_seqlens,"
    " int total, SymInt seed, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("mimfast::mask_guided")
def _allocate(importance, sample_ids, epochs, epoch, rows, cols, unit, keep_units, cu_seqlens, total, seed, impl):  # noqa: ARG001
    return _masks.allocate_plan(sample_ids, rows * cols, total, cu_seqlens is not None)


@torch.library.impl("mimfast::mask_guided", ("cpu", "cuda"))
def _run(importance, sample_ids, epochs, epoch, rows, cols, unit, keep_units, cu_seqlens, total, seed, impl):
    lists = _masks.allocate_plan(sample_ids, rows * cols, total, cu_seqlens is not None)
    counts = Counts(keep_units, cu_seqlens, total)
    run_native(
        _native.core(), impl, sample_ids, epochs, epoch, rows, cols, unit, counts, seed, lists, importance=importance
    )
    return lists
