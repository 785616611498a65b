"""Random masking as a pure function of (seed, epoch, sample id): which tokens each image shows to the encoder.

He et al., "Masked autoencoders are scalable vision learners", arXiv:2111.06377, section 3 and algorithm of random
masking; Xie et al., "SimMIM", arXiv:2111.09886, section 3.2 for mask units larger than a token and for rounding the
hidden count up; Wei et al., "MaskFeat", arXiv:2112.09133, and Tong et al., "VideoMAE", arXiv:2203.12602, for the other
two roundings.

The tokens form a grid of rows x cols, cut into square mask units of unit x unit tokens. Unit u of a sample draws word u
of the mask stream (mimfast/philox.py); the units with the smallest (word, u) are kept. Official code keeps the units of
smallest uniform noise, so the law of the mask is the same; here it does not depend on batch size, workers or device.

B samples, U mask units, L tokens, K kept tokens, T kept tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._masks import ALL_BITS, Counts, MaskPlan, Rounding, address, select_ref
from mimfast.philox import STREAM_MASK, check_seed, words

IMPLS = ("cuda", "cpu", "ref")
MAX_UNITS_CUDA = 8192  # kMaskPlanMaxUnitsCuda in csrc/mask_plan.h


def mask_plan_ref(
    sample_ids_B: Tensor,
    epoch: int | Tensor,
    rows: int,
    cols: int,
    unit: int,
    counts: Counts,
    seed: int,
    word_mask: int = ALL_BITS,
) -> MaskPlan:
    """The specification, in traceable torch for any device. Tests force ties with few bits in word_mask."""
    units = (rows // unit) * (cols // unit)
    word_BU = words(seed, STREAM_MASK, epoch, sample_ids_B, units) & word_mask
    return select_ref(word_BU, rows, cols, unit, counts)


def mask_plan(
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
    impl: Impl = "auto",
) -> MaskPlan:
    """Draw one random mask per sample. Bit-identical for every impl and device, and for a sample in any batch.

    Args:
        batch: B.
        grid: (rows, cols) in tokens; L = rows * cols.
        ratio: share of hidden units, in [0, 1); or one for each sample, and then the lists are packed (see MaskPlan)
            with exact sizes. The ratios are host numbers: under CUDA graphs they are baked in, and the capture needs
            one call before.
        unit: side of a square mask unit in tokens; divides rows and cols. U = L / unit^2.
        sample_ids: (B,) int64, all 64 bits count; None stands for 0 .. B - 1.
        seed: int in [0, 2^64).
        epoch: int, or (B,) int64 on the device of sample_ids; the low 32 bits count. A CUDA graph bakes an int in.
        rounding: "keep_floor" keeps int(U * (1 - ratio)) units (MAE); "hide_floor" hides int(U * ratio) (VideoMAE,
            MixMIM), "hide_ceil" ceil(U * ratio) (SimMIM), "hide_round" round(U * ratio) (MaskFeat).
        device: where the plan is made; that of sample_ids by default.
        impl: "auto", "ref", "cpu" (native, CPU tensors) or "cuda" (at most 8192 units).
    Returns:
        MaskPlan.
    Raises:
        UserError: a ratio outside [0, 1), no visible token, a unit that does not divide the grid, sample_ids, epoch or
            seed of the wrong kind, an impl that cannot take the call.
    """
    rows, cols = _masks.check_grid("mask_plan", grid, unit)
    check_seed("mask_plan", seed)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    _masks.check_samples("mask_plan", batch, sample_ids, epoch, device)
    units = rows * cols // unit**2
    counts = _masks.counts_of("mask_plan", batch, units, unit**2, ratio, rounding, sample_ids.device)
    chosen = resolve("mask_plan", impl, IMPLS, partial(_why_not, sample_ids.device.type, units))
    if chosen == "ref":
        return mask_plan_ref(sample_ids, epoch, rows, cols, unit, counts, seed)
    epochs, epoch = _masks.split_epoch(epoch)
    keep, inverse, hidden, hide = torch.ops.mimfast.mask_plan(
        sample_ids, epochs, epoch, rows, cols, unit, *counts, _masks.signed(seed), chosen
    )
    return MaskPlan(keep, inverse, hidden, hide, counts.cu_seqlens)


def _why_not(device: str, units: int, impl: str) -> str | None:
    if impl == "cuda" and units > MAX_UNITS_CUDA:
        return f"the CUDA kernel takes at most {MAX_UNITS_CUDA} mask units and the grid has {units}"
    return why_not_on(impl, device)


# contract: one schema and one fake; integers have no gradient, so there is no autograd
torch.library.define(
    "mimfast::mask_plan",
    # SymInt: under torch.compile a new epoch or seed is no reason to compile again
    f"({_masks.SAMPLES}, int rows, int cols, int unit, int keep_units, Tensor? cu_seqlens, int total, SymInt seed,"
    " str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("mimfast::mask_plan")
def _allocate(sample_ids, epochs, epoch, rows, cols, unit, keep_units, cu_seqlens, total, seed, impl):  # noqa: ARG001
    return _masks.allocate_plan(sample_ids, rows * cols, total, cu_seqlens is not None)


@torch.library.impl("mimfast::mask_plan", ("cpu", "cuda"))
def _run(sample_ids, epochs, epoch, rows, cols, unit, keep_units, cu_seqlens, total, seed, impl):
    lists = _allocate(sample_ids, epochs, epoch, rows, cols, unit, keep_units, cu_seqlens, total, seed, impl)
    counts = Counts(keep_units, cu_seqlens, total)
    run_native(_native.core(), impl, sample_ids, epochs, epoch, rows, cols, unit, counts, seed, lists)
    return lists


def run_native(
    core, impl, sample_ids, epochs, epoch, rows, cols, unit, counts, seed, lists, word_mask=ALL_BITS, importance=None
) -> None:
    """Fill `lists` (keep, inverse, hidden, hide) with a native core: mimfast._core, or the emulated one in tests.

    With importance (B, U) fp32 this is mask_guided, which differs from mask_plan in the key of a unit alone.
    """
    held = [None if t is None else t.contiguous() for t in (sample_ids, epochs, counts.cu_seqlens, importance)]
    keep, inverse, hidden, hide = (address(t) for t in lists)
    call = core.MaskPlan(
        sample_ids=address(held[0]), epochs=address(held[1]), epoch=epoch, batch=len(sample_ids), rows=rows, cols=cols,
        unit=unit, keep_units=counts.units, cu_seqlens=address(held[2]), importance=address(held[3]),
        seed=seed & (1 << 64) - 1, word_mask=word_mask, keep=keep, inverse=inverse, hidden=hidden, hide=hide,
    )  # fmt: skip
    _masks.launch(core, "mask_plan" if importance is None else "mask_guided", impl, call, sample_ids.device)
