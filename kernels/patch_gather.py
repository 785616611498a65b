"""The kept patches of images as rows of the patch embedding's matrix product, normalised on the way.

Work: a program takes ROWS rows times BLOCK of their D values, TILE values in all. It reads the rows' indices, then the
pixels of those patches alone, applies one multiply-add per value and writes them in the order of the row.
Bytes, D = 768, uint8 images, bf16 rows: 8 + 768 read and 1536 written per kept patch; nothing per hidden one.
fp32: scale and shift. x * scale + shift differs from (x / 255 - mean) / std by at most about 4 units in the last place
of the largest |x * scale|, far below a bf16 row's rounding.
Deterministic: one writer per element. A packed row finds its image by bisection in cu_seqlens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # values per program, 8 per lane with 4 warps
BLOCKS = (1024, 512, 256, 128, 64, 32)


@triton.jit
def patch_gather_kernel(
    img_ptr,  # [B, 3, H, W] uint8 or floating point, any strides; only pixels of kept patches are read
    keep_ptr,  # [rows] int64, contiguous; read unless ALL
    flip_ptr,  # [B] uint8, contiguous; read if FLIP
    bounds_ptr,  # [B + 1] int32, contiguous; read if PACKED
    out_ptr,  # [rows, D] floating point, contiguous, fully written
    rows, K, B, L, grid_w,  # rows in all and per image, images, patches per image and per row of patches
    steps,  # of the bisection: enough for B + 1 bounds
    img_b, img_c, img_h, img_w,  # strides in elements
    scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,  # value = x * scale + shift, per channel
    PATCH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LAST: tl.constexpr,  # channels last: (p, q, c) rows, not (c, p, q)
    SCALED: tl.constexpr,  # uint8 images
    ALL: tl.constexpr, FLIP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # rows and patches are counted in 32 bits, because they are divided; offsets in memory have 64
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    if PACKED:
        low_R = tl.zeros([ROWS], tl.int32)
        high_R = low_R + (B + 1)
        for _ in range(steps):
            open_R, middle_R = low_R < high_R, (low_R + high_R) // 2
            bound_R = tl.load(bounds_ptr + middle_R, mask=open_R, other=0)
            right_R = bound_R <= row_R
            low_R = tl.where(open_R & right_R, middle_R + 1, low_R)
            high_R = tl.where(open_R & (bound_R > row_R), middle_R, high_R)
        b_R = low_R - 1
    else:
        b_R = row_R // K
    if ALL:
        l_R = row_R % K
        fits_R = inside_R
    else:
        index_R = tl.load(keep_ptr + row_R, mask=inside_R, other=-1)
        fits_R = inside_R & (index_R >= 0) & (index_R < L)
        l_R = index_R.to(tl.int32)
    fits_R = fits_R & (b_R >= 0) & (b_R < B)

    left_R, step_R = (l_R % grid_w) * PATCH, img_w
    if FLIP:
        flip_R = tl.load(flip_ptr + b_R, mask=fits_R, other=0) != 0
        left_R = tl.where(flip_R, grid_w * PATCH - 1 - left_R, left_R)
        step_R = tl.where(flip_R, -1, 1).to(tl.int64) * img_w
    top_R = (l_R // grid_w) * PATCH
    corner_R = b_R.to(tl.int64) * img_b + top_R.to(tl.int64) * img_h + left_R.to(tl.int64) * img_w

    d_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    full_D = d_D < D
    if LAST:
        c_D, px_D, py_D = d_D % 3, (d_D // 3) % PATCH, d_D // (3 * PATCH)
    else:
        c_D, px_D, py_D = d_D // (PATCH * PATCH), d_D % PATCH, (d_D // PATCH) % PATCH
    line_D = py_D.to(tl.int64) * img_h + c_D.to(tl.int64) * img_c
    if FLIP:
        at_RD = corner_R[:, None] + line_D[None, :] + px_D.to(tl.int64)[None, :] * step_R[:, None]
    else:
        at_RD = corner_R[:, None] + (line_D + px_D.to(tl.int64) * img_w)[None, :]
    read_RD = fits_R[:, None] & full_D[None, :]
    value = tl.load(img_ptr + at_RD, mask=read_RD, other=0).to(tl.float32)
    if SCALED:
        scale_D = tl.where(c_D == 0, scale_0, tl.where(c_D == 1, scale_1, scale_2))
        shift_D = tl.where(c_D == 0, shift_0, tl.where(c_D == 1, shift_1, shift_2))
        value = tl.where(fits_R[:, None], value * scale_D[None, :] + shift_D[None, :], 0.0)
    to_RD = row_R.to(tl.int64)[:, None] * D + d_D[None, :]
    tl.store(out_ptr + to_RD, value.to(out_ptr.dtype.element_ty), mask=inside_R[:, None] & full_D[None, :])


def patch_gather(
    img: Tensor, keep: Tensor | None, flip: Tensor | None, cu_seqlens: Tensor | None, patch: int,
    mean: list[float], std: list[float], order: str, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`; the indices and flags are contiguous, on its device."""
    B, D = img.shape[0], 3 * patch * patch
    rows, cols = out.numel() // D, img.shape[3] // patch
    if rows == 0:
        return
    raw, block, together = img.dtype == torch.uint8, *tiling(D)
    scale = [1 / (255 * s) if raw else 1.0 for s in std]
    shift = [-m / s if raw else 0.0 for m, s in zip(mean, std)]
    some = out if keep is None else keep  # what is not read still needs a pointer
    flags = some if flip is None else flip.view(torch.uint8)
    with torch.cuda.device_of(img):
        patch_gather_kernel[(triton.cdiv(rows, together), triton.cdiv(D, block))](
            img, some, flags, some if cu_seqlens is None else cu_seqlens, out,
            rows, rows // B, B, (img.shape[2] // patch) * cols, cols, (B + 1).bit_length(),
            *img.stride(), *scale, *shift,
            PATCH=patch, D=D, BLOCK=block, ROWS=together, LAST=order == "pqc", SCALED=raw,
            ALL=keep is None, FLIP=flip is not None, PACKED=cu_seqlens is not None, num_warps=4,
        )  # fmt: skip


def tiling(D: int) -> tuple[int, int]:
    """Columns and rows of a program: the columns that leave the fewest lanes idle at the end of a row."""
    block = min(BLOCKS, key=lambda b: (triton.cdiv(D, b) * b, -b))
    return block, TILE // block


def _aot(img: str, out: str, patch: int, **changes: bool | int) -> tuple:
    """One compilation as training makes it: dense NCHW images unless the strides are changed."""
    D = 3 * patch * patch
    block, together = tiling(D)
    types = {"img_ptr": img, "keep_ptr": "*i64", "flip_ptr": "*u8", "bounds_ptr": "*i32", "out_ptr": out}
    types |= dict.fromkeys(("rows", "K", "B", "L", "grid_w", "steps"), "i32")
    types |= dict.fromkeys(("img_b", "img_c", "img_h"), "i32:16" if patch % 16 == 0 else "i32")
    types |= {f"{s}_{c}": "fp32" for s in ("scale", "shift") for c in range(3)}
    constants = {"img_w": 1, "PATCH": patch, "D": D, "BLOCK": block, "ROWS": together, "SCALED": img == "*u8"}
    constants |= dict.fromkeys(("LAST", "ALL", "FLIP", "PACKED"), False) | changes
    return patch_gather_kernel, {k: v for k, v in types.items() if k not in constants}, constants, 4


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    "u8-bf16-16": _aot("*u8", "*bf16", 16),
    "u8-bf16-16-flip": _aot("*u8", "*bf16", 16, FLIP=True),
    "u8-bf16-16-packed": _aot("*u8", "*bf16", 16, PACKED=True),
    "u8-bf16-14-pqc-nhwc": _aot("*u8", "*bf16", 14, LAST=True, img_w=3, img_c=1),
    "bf16-bf16-16-all": _aot("*bf16", "*bf16", 16, ALL=True),
    "fp32-fp16-32": _aot("*fp32", "*fp16", 32),
}
