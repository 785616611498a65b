"""Random masking as a pure function of (seed, epoch, sample id): which tokens each image shows to the encoder.

He et al., "Masked autoencoders are scalable vision learners", arXiv:2111.06377, section 3; Xie et al., "SimMIM",
arXiv:2111.09886, section 3.2 for mask units larger than a token and for rounding the hidden count up.

The tokens form a grid of rows x cols, cut into square mask units of unit x unit tokens. Unit u of a sample draws word u
of the mask stream (mimfast/philox.py); the units with the smallest (word, u) are kept. Official code keeps the units of
smallest uniform noise, so the law of the mask is the same; here it does not depend on batch size, workers or device.

B samples, U mask units, L tokens, K kept tokens.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_shape, fail
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.philox import STREAM_MASK, check_seed, words

IMPLS = ("cuda", "cpu", "ref")
MAX_UNITS_CUDA = 8192  # kMaskPlanMaxUnitsCuda in csrc/mask_plan.h
ALL_BITS = 0xFFFFFFFF


class MaskPlan(NamedTuple):
    """keep (B, K) int64 ascending; inverse (B, L) int64, a permutation; hidden (B, L) bool, True = not seen."""

    keep: Tensor
    inverse: Tensor
    hidden: Tensor


def mask_plan_ref(
    sample_ids_B: Tensor,
    epoch: int | Tensor,
    rows: int,
    cols: int,
    unit: int,
    keep_units: int,
    seed: int,
    word_mask: int = ALL_BITS,
) -> MaskPlan:
    """The specification, in traceable torch for any device. Tests force ties with few bits in word_mask."""
    B, units = len(sample_ids_B), (rows // unit) * (cols // unit)
    word_BU = words(seed, STREAM_MASK, epoch, sample_ids_B, units) & word_mask
    key_BU = word_BU << 26 | torch.arange(units, device=word_BU.device)
    last_kept_B1 = key_BU.sort().values[:, keep_units - 1 : keep_units]
    hidden_BU = (key_BU > last_kept_B1).view(B, rows // unit, 1, cols // unit, 1)
    hidden_BL = hidden_BU.expand(-1, -1, unit, -1, unit).reshape(B, rows * cols)
    order_BL = hidden_BL.to(torch.uint8).argsort(stable=True)  # kept ascending, then hidden ascending
    return MaskPlan(order_BL[:, : keep_units * unit * unit].contiguous(), order_BL.argsort(), hidden_BL)


def mask_plan(
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
    impl: Impl = "auto",
) -> MaskPlan:
    """Draw one random mask per sample. Bit-identical for every impl and device, and for a sample in any batch.

    Args:
        batch: B.
        grid: (rows, cols) in tokens; L = rows * cols.
        ratio: share of hidden units, in [0, 1).
        unit: side of a square mask unit in tokens; divides rows and cols. U = L / unit^2.
        sample_ids: (B,) int64, all 64 bits count; None stands for 0 .. B - 1.
        seed: int in [0, 2^64).
        epoch: int, or (B,) int64 on the device of sample_ids; the low 32 bits count. A CUDA graph bakes an int in.
        rounding: "keep_floor" keeps int(U * (1 - ratio)) units, as MAE; "hide_ceil" hides ceil(U * ratio), as SimMIM.
        device: where the plan is made; that of sample_ids by default.
        impl: "auto", "ref", "cpu" (native, CPU tensors) or "cuda" (at most 8192 units).
    Returns:
        MaskPlan. inverse gives each token its place in [kept ascending | hidden ascending] (the ids_restore of MAE):
        kept tokens hold 0 .. K - 1, hidden ones K .. L - 1.
    Raises:
        UserError: a ratio outside [0, 1), no visible token, a unit that does not divide the grid, sample_ids, epoch or
            seed of the wrong kind, an impl that cannot take the call.
    """
    rows, cols = _check_grid(grid, unit)
    keep_units = _count_kept(rows * cols // unit**2, ratio, rounding)
    check_seed("mask_plan", seed)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    _check_samples(batch, sample_ids, epoch, device)
    chosen = resolve("mask_plan", impl, IMPLS, partial(_why_not, sample_ids.device.type, rows * cols // unit**2))
    if chosen == "ref":
        return mask_plan_ref(sample_ids, epoch, rows, cols, unit, keep_units, seed)
    epochs, epoch = (epoch, 0) if isinstance(epoch, Tensor) else (None, epoch)
    signed_seed = seed if seed < 1 << 63 else seed - (1 << 64)  # the schema has signed ints
    plan = torch.ops.mimfast.mask_plan(sample_ids, epochs, epoch, rows, cols, unit, keep_units, signed_seed, chosen)
    return MaskPlan(*plan)


def _check_grid(grid: tuple[int, int], unit: int) -> tuple[int, int]:
    if len(grid) != 2 or min(grid) < 1:
        fail("mask_plan", "grid", tuple(grid), "two positive ints", "it holds the rows and columns of tokens")
    rows, cols = grid
    if unit < 1 or rows % unit or cols % unit:
        fail(
            "mask_plan",
            "unit",
            unit,
            f"a divisor of {rows} and {cols}",
            f"whole units must tile the grid of {rows} x {cols} tokens",
        )
    if rows * cols > 1 << 26:
        fail("mask_plan", "grid", f"{rows * cols} tokens", f"at most {1 << 26}", "a sample has 2**26 random words")
    return rows, cols


def _count_kept(units: int, ratio: float, rounding: str) -> int:
    if not 0 <= ratio < 1:
        fail("mask_plan", "ratio", ratio, "a number in [0, 1)", "it is the share of mask units that are hidden")
    if rounding == "keep_floor":
        kept = int(units * (1 - ratio))
    elif rounding == "hide_ceil":
        kept = units - math.ceil(units * ratio)
    else:
        fail("mask_plan", "rounding", repr(rounding), "'keep_floor' or 'hide_ceil'", "there are these two rules")
    if kept < 1:
        because = f"it leaves {kept} of {units} mask units visible ({rounding}) and the encoder needs one"
        fail("mask_plan", "ratio", ratio, "a smaller one", because)
    return kept


def _check_samples(batch: int, sample_ids: Tensor, epoch: int | Tensor, device: torch.device | str | None) -> None:
    check_shape("mask_plan", "sample_ids", sample_ids, (batch,), f"batch is {batch}")
    check_dtype("mask_plan", "sample_ids", sample_ids, (torch.int64,), "all 64 bits of an id enter the counter")
    if device is not None and torch.empty(0, device=device).device != sample_ids.device:
        fail("mask_plan", "sample_ids", f"device {sample_ids.device}", device, "nothing is moved silently")
    if isinstance(epoch, Tensor):
        check_shape("mask_plan", "epoch", epoch, (batch,), f"a tensor holds one epoch per sample and batch is {batch}")
        check_dtype("mask_plan", "epoch", epoch, (torch.int64,), "it enters the counter as an integer")
        if epoch.device != sample_ids.device:
            fail("mask_plan", "epoch", f"device {epoch.device}", sample_ids.device, "sample_ids is there")


def _why_not(device: str, units: int, impl: str) -> str | None:
    if impl == "cuda" and units > MAX_UNITS_CUDA:
        return f"the CUDA kernel takes at most {MAX_UNITS_CUDA} mask units and the grid has {units}"
    return why_not_on(impl, device)


# contract: one schema and one fake; integers have no gradient, so there is no autograd
torch.library.define(
    "mimfast::mask_plan",
    # SymInt: under torch.compile a new epoch or seed is no reason to compile again
    "(Tensor sample_ids, Tensor? epochs, SymInt epoch, int rows, int cols, int unit, int keep_units, SymInt seed,"
    " str impl) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("mimfast::mask_plan")
def _allocate(sample_ids, epochs, epoch, rows, cols, unit, keep_units, seed, impl):  # noqa: ARG001
    B, tokens = sample_ids.shape[0], rows * cols
    keep_BK = sample_ids.new_empty(B, keep_units * unit * unit)
    return keep_BK, sample_ids.new_empty(B, tokens), sample_ids.new_empty(B, tokens, dtype=torch.bool)


@torch.library.impl("mimfast::mask_plan", ("cpu", "cuda"))
def _run(sample_ids, epochs, epoch, rows, cols, unit, keep_units, seed, impl):
    plan = _allocate(sample_ids, epochs, epoch, rows, cols, unit, keep_units, seed, impl)
    run_native(_native.core(), impl, sample_ids, epochs, epoch, rows, cols, unit, keep_units, seed, ALL_BITS, plan)
    return plan


def run_native(core, impl, sample_ids, epochs, epoch, rows, cols, unit, keep_units, seed, word_mask, plan) -> None:
    """Fill `plan` (keep, inverse, hidden) with a native core: mimfast._core, or the emulated one in tests."""
    sample_ids = sample_ids.contiguous()
    epochs = None if epochs is None else epochs.contiguous()
    keep, inverse, hidden = (t.data_ptr() for t in plan)
    call = core.MaskPlan(
        sample_ids=sample_ids.data_ptr(), epochs=0 if epochs is None else epochs.data_ptr(), epoch=epoch,
        batch=len(sample_ids), rows=rows, cols=cols, unit=unit, keep_units=keep_units, seed=seed & (1 << 64) - 1,
        word_mask=word_mask, keep=keep, inverse=inverse, hidden=hidden,
    )  # fmt: skip
    if impl == "cpu":
        core.mask_plan_cpu(call, torch.get_num_threads())
    elif sample_ids.is_cuda:
        with torch.cuda.device(sample_ids.device):
            core.mask_plan_cuda(call, torch.cuda.current_stream().cuda_stream)
    else:
        core.mask_plan_cuda(call, 0)
