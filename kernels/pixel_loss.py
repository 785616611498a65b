"""Loss of predicted against true pixels over hidden patches, and the gradient of the prediction in the same pass.

Work: one program takes ROWS patches (rows of `pred`; one from 14 x 14 pixels up). For a hidden patch it reads the D
predictions and the D pixels once, takes mean and variance in two passes over registers, and writes one loss and D
gradients; for a visible one it reads a flag and writes a zero loss and D zeros. In the compact layout every row has the
index of its patch and no row is visible, unless its index is out of range.
Bytes, D = 768, bf16 predictions, uint8 images: 1536 + 768 read and 1536 written per hidden patch, 1536 written per
visible one.
Backward: the gradient was stored for an upstream gradient of 1. When it is 1 the second launch only reads that scalar;
otherwise it computes the gradient anew from the same bytes, so that it is rounded once and fp16 does not underflow at
1 / (count * D).
fp32: everything between load and store.
Deterministic: one writer per element, no atomics; torch adds up the per-patch losses in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimfast.kernels.loss_tail import KINDS, penalty, rows_that_count
from mimfast.ops._losses import count

TILE = 1024  # elements per program, 8 per lane with 4 warps; small patches share a program, large ones get more warps


@triton.jit
def pixel_loss_kernel(
    pred_ptr,  # [B, R, D] fp32, bf16 or fp16, any strides; only hidden rows are read
    img_ptr,  # [B, 3, H, W] uint8 or floating point, any strides; only pixels of hidden patches are read
    hidden_ptr,  # [B, R] contiguous: uint8, 1 = hidden, R = L; or (COMPACT) int64, the patch each row predicts
    count_ptr,  # [] int64, number of hidden patches in the batch
    loss_ptr,  # [B * R] fp32, fully written if LOSS; adds up to the loss
    grad_ptr,  # [B, R, D] as pred, contiguous, fully written if GRAD
    upstream_ptr,  # [] fp32, read unless LOSS
    rows, R, L, grid_w,  # B * R; rows of pred, patches, and patches side by side, of an image
    pred_b, pred_r, pred_d,  # strides in elements
    img_b, img_c, img_h, img_w,
    scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,  # pixel value = x * scale + shift, per channel
    eps, beta,
    PATCH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    KIND: tl.constexpr,  # 0 mse, 1 l1, 2 smooth_l1
    LOSS: tl.constexpr, GRAD: tl.constexpr,  # what to write: both, the loss alone, or (backward) the gradient alone
    COMPACT: tl.constexpr,
    MAJOR: tl.constexpr,  # values in (c, py, px) order, channel slowest; else in (py, px, c) order
    STALE: tl.constexpr,  # backward: grad_ptr does not hold the gradient for an upstream gradient of 1
):  # fmt: skip
    upstream = 1.0
    if not LOSS:
        upstream = tl.load(upstream_ptr)
        if not STALE:  # noqa: SIM102  a constant and a run-time condition do not mix
            if upstream == 1.0:
                return
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    b_R, r_R = row_R // R, row_R % R
    l_R, hidden_R = rows_that_count(hidden_ptr, row_R, rows, R, L, COMPACT)
    count = tl.maximum(tl.load(count_ptr), 1).to(tl.float32)
    weight = 1.0 / (count * D)

    d_D = tl.arange(0, BLOCK_D)
    full_D = d_D < D
    read_RD = hidden_R[:, None] & full_D[None, :]

    if MAJOR:
        c_D, py_D, px_D = d_D // (PATCH * PATCH), d_D // PATCH % PATCH, d_D % PATCH
    else:
        py_D, px_D, c_D = d_D // (3 * PATCH), d_D // 3 % PATCH, d_D % 3
    corner_R = b_R * img_b + (l_R // grid_w) * PATCH * img_h + (l_R % grid_w) * PATCH * img_w
    pixel_D = py_D.to(tl.int64) * img_h + px_D.to(tl.int64) * img_w + c_D.to(tl.int64) * img_c
    target = tl.load(img_ptr + corner_R[:, None] + pixel_D[None, :], mask=read_RD, other=0).to(tl.float32)
    scale_D = tl.where(c_D == 0, scale_0, tl.where(c_D == 1, scale_1, scale_2))
    shift_D = tl.where(c_D == 0, shift_0, tl.where(c_D == 1, shift_1, shift_2))
    target = target * scale_D[None, :] + shift_D[None, :]
    if NORM:
        # correctly rounded divisions, one per row: a constant patch then has a variance of exactly 0
        mean_R = tl.div_rn(tl.sum(tl.where(full_D[None, :], target, 0.0), axis=1), D * 1.0)
        target = target - mean_R[:, None]
        var_R = tl.div_rn(tl.sum(tl.where(full_D[None, :], target * target, 0.0), axis=1), D - 1.0)
        target = target * tl.div_rn(1.0, tl.sqrt_rn(var_R + eps))[:, None]

    from_RD = (b_R * pred_b + r_R * pred_r)[:, None] + d_D.to(tl.int64)[None, :] * pred_d
    pred = tl.load(pred_ptr + from_RD, mask=read_RD, other=0.0).to(tl.float32)
    diff = tl.where(read_RD, pred - target, 0.0)
    loss, step = penalty(diff, beta, KIND)
    if LOSS:
        tl.store(loss_ptr + row_R, tl.sum(loss, axis=1) * weight, mask=inside_R)
    if GRAD:
        # where(): an upstream NaN or infinity does not reach visible patches
        step = tl.where(read_RD, step * (weight * upstream), 0.0)
        at_RD = row_R[:, None] * D + d_D[None, :]
        tl.store(grad_ptr + at_RD, step.to(grad_ptr.dtype.element_ty), mask=inside_R[:, None] & full_D[None, :])


def pixel_loss_fwd(
    pred: Tensor, img: Tensor, hidden: Tensor, patch: int, norm: bool, kind: str,
    order: str, mean: list[float], std: list[float], eps: float, beta: float, grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, the gradient of pred for an upstream gradient of 1 (empty unless `grad`), the hidden count."""
    counted = count(hidden, (img.shape[2] // patch) * (img.shape[3] // patch))
    loss_R = torch.empty(hidden.numel(), dtype=torch.float32, device=pred.device)
    d_pred = torch.empty(pred.shape if grad else (0,), dtype=pred.dtype, device=pred.device)
    inputs = (pred, img, hidden, counted, loss_R, d_pred, loss_R)
    _launch(inputs, patch, norm, kind, order, mean, std, eps, beta, LOSS=True, GRAD=grad, STALE=True)
    return loss_R.sum(), d_pred, counted


def pixel_loss_bwd(
    d_pred: Tensor, pred: Tensor, img: Tensor, hidden: Tensor, counted: Tensor, upstream: Tensor, patch: int,
    norm: bool, kind: str, order: str, mean: list[float], std: list[float], eps: float, beta: float, stale: bool,
) -> None:  # fmt: skip
    """Turn `d_pred`, as the forward left it, or with any content when `stale`, into the gradient for `upstream`."""
    inputs = (pred, img, hidden, counted, d_pred, d_pred, upstream)
    _launch(inputs, patch, norm, kind, order, mean, std, eps, beta, LOSS=False, GRAD=True, STALE=stale)


def _launch(
    inputs: tuple[Tensor, ...], patch: int, norm: bool, kind: str,
    order: str, mean: list[float], std: list[float], eps: float, beta: float, **what: bool,
) -> None:  # fmt: skip
    pred, img, hidden, *rest = inputs
    B, R, D = pred.shape
    compact = hidden.dtype == torch.int64
    grid = img.shape[2] // patch, img.shape[3] // patch
    raw = img.dtype == torch.uint8
    scale = [1 / (255 * s) if raw else 1.0 for s in std]
    shift = [-m / s if raw else 0.0 for m, s in zip(mean, std)]
    block, rows, warps = tiling(D)
    if B * R == 0:
        return
    hidden = hidden.contiguous() if compact else hidden.contiguous().view(torch.uint8)
    with torch.cuda.device_of(pred):
        pixel_loss_kernel[(triton.cdiv(B * R, rows),)](
            pred, img, hidden, *rest, B * R, R, grid[0] * grid[1], grid[1],
            *pred.stride(), *img.stride(), *scale, *shift, eps, beta,
            PATCH=patch, D=D, BLOCK_D=block, ROWS=rows, NORM=norm, KIND=KINDS[kind], COMPACT=compact,
            MAJOR=order == "cpq", num_warps=warps, **what,
        )  # fmt: skip


def tiling(D: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a program for patches of D values."""
    block = triton.next_power_of_2(D)
    return block, max(1, TILE // block), 4 if block <= 2048 else 8


def _aot(pred: str, img: str, patch: int, hidden: str = "*u8", **constants: bool | int) -> tuple:
    """One compilation as training makes it: dense NCHW images and predictions, so that both last strides are 1."""
    D = patch * patch * 3
    block, rows, warps = tiling(D)
    types = {
        "pred_ptr": pred,
        "img_ptr": img,
        "hidden_ptr": hidden,
        "count_ptr": "*i64",
        "loss_ptr": "*fp32",
        "grad_ptr": pred,
    }
    types |= {"upstream_ptr": "*fp32", **dict.fromkeys(("rows", "R", "L", "grid_w"), "i32")}
    types |= dict.fromkeys(("pred_b", "pred_r", "img_b", "img_c", "img_h"), "i32:16" if patch == 16 else "i32")
    types |= {f"{s}_{c}": "fp32" for s in ("scale", "shift") for c in range(3)} | {"eps": "fp32", "beta": "fp32"}
    shape = {"pred_d": 1, "img_w": 1, "PATCH": patch, "D": D, "BLOCK_D": block, "ROWS": rows}
    shape |= {"NORM": True, "KIND": 0, "GRAD": True, "COMPACT": hidden == "*i64", "MAJOR": False}
    return pixel_loss_kernel, types, shape | constants, warps


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    "fwd-bf16-u8-16": _aot("*bf16", "*u8", 16, LOSS=True, STALE=True),
    "fwd-fp32-bf16-14-smooth": _aot("*fp32", "*bf16", 14, LOSS=True, STALE=True, KIND=2),
    "fwd-fp16-fp32-32-l1": _aot("*fp16", "*fp32", 32, LOSS=True, STALE=True, KIND=1),
    "fwd-bf16-u8-16-compact": _aot("*bf16", "*u8", 16, "*i64", LOSS=True, STALE=True),
    "fwd-bf16-u8-4": _aot("*bf16", "*u8", 4, LOSS=True, STALE=True),
    "fwd-bf16-u8-16-cpq-l1": _aot("*bf16", "*u8", 16, LOSS=True, STALE=True, MAJOR=True, KIND=1, NORM=False),
    "bwd-bf16-u8-16": _aot("*bf16", "*u8", 16, LOSS=False, STALE=False),
    "eval-bf16-u8-16": _aot("*bf16", "*u8", 16, LOSS=True, STALE=True, GRAD=False),
}
