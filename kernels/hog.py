"""Histograms of oriented gradients of 8-bit images, to the same bits as mimfast/ops/hog.py and csrc/hog.h.

Work: a program makes the nine values of CELLS cells of one colour of one image. Its tile is (cells, pixels across a
cell); it walks down the rows of the cells with two rows of partial gradients and nine sums in registers, then adds the
pixels of each cell up.
Bytes: each pixel once from HBM (its neighbours and the two rows around a cell come from cache), nine values written
for each cell and colour. The memory floor is far below the time of the instructions.
Gradients are integers in fp32, magnitudes correctly rounded fp32 roots cut to int32, sums int32, squared norms int64:
no sum depends on its order, and there is no product and sum that a compiler could fuse inexactly.
Deterministic: one writer per value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # pixels of a tile, 4 per lane with 4 warps: nine sums and four rows of gradients take 52 registers
TAN_20, TAN_40, TAN_60, TAN_80 = (
    tl.constexpr(t) for t in (0.36397023426620234, 0.83909963117727993, 1.7320508075688772, 5.6712818196177066)
)


@triton.jit
def _reflect(i, size):
    return tl.where(i < 0, -i, tl.where(i < size, i, 2 * size - 2 - i))


@triton.jit
def _line(plane_ptr, y, height, img_h, left, middle, right, inside):
    """d = left - right and s = left + 2 middle + right of a row of pixels."""
    line_ptr = plane_ptr + _reflect(y, height).to(tl.int64)[:, None] * img_h
    left = tl.load(line_ptr + left, mask=inside, other=0).to(tl.float32)
    middle = tl.load(line_ptr + middle, mask=inside, other=0).to(tl.float32)
    right = tl.load(line_ptr + right, mask=inside, other=0).to(tl.float32)
    return left - right, left + 2.0 * middle + right


@triton.jit
def hog_kernel(
    img_ptr,  # [B, 3, H, W] uint8, any strides
    index_ptr,  # [B, R] int64, contiguous, tokens; read if PICKED
    weight_ptr,  # [window] fp32, one side of the window, scaled; read if WINDOW
    out_ptr,  # [B, 27, H / CELL, W / CELL] if DENSE, else [B, R, 27 * SIDE * SIDE]; contiguous, fully written
    R, height, width, window,
    img_b, img_c, img_h, img_w,  # strides in elements
    unit, factor_0, factor_1, factor_2,
    CELL: tl.constexpr, ACROSS: tl.constexpr,  # side of a cell and the power of two it fits in
    CELLS: tl.constexpr, SIDE: tl.constexpr,  # cells of a program, cells across a token
    DENSE: tl.constexpr, PICKED: tl.constexpr, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    b, c = (plane // 3).to(tl.int64), plane % 3
    n_N = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    w, h = width // CELL, height // CELL
    if DENSE:
        fits_N = n_N < h * w
        exists_N = fits_N
        i_N, j_N = n_N // w, n_N % w
        step = h.to(tl.int64) * w
        at_N = (b * 27 + 9 * c) * step + n_N
    else:
        row_N, part_N = n_N // (SIDE * SIDE), n_N % (SIDE * SIDE)
        fits_N = row_N < R
        exists_N = fits_N
        token_N = row_N
        if PICKED:
            index_N = tl.load(index_ptr + b * R + row_N, mask=fits_N, other=-1)
            exists_N = (index_N >= 0) & (index_N < (h // SIDE) * (w // SIDE))
            token_N = tl.where(exists_N, index_N, 0).to(tl.int32)
        i_N = token_N // (w // SIDE) * SIDE + part_N // SIDE
        j_N = token_N % (w // SIDE) * SIDE + part_N % SIDE
        step = tl.full([], SIDE * SIDE, tl.int64)
        at_N = ((b * R + row_N) * 27 + 9 * c) * step + part_N

    p_P = tl.arange(0, ACROSS)
    inside_NP = exists_N[:, None] & (p_P < CELL)[None, :]
    x_NP = j_N[:, None] * CELL + p_P[None, :]
    left_NP = _reflect(x_NP - 1, width).to(tl.int64) * img_w
    middle_NP = x_NP.to(tl.int64) * img_w
    right_NP = _reflect(x_NP + 1, width).to(tl.int64) * img_w
    plane_ptr = img_ptr + b * img_b + c.to(tl.int64) * img_c
    y_N = i_N * CELL
    weight_x_NP = tl.zeros([CELLS, ACROSS], tl.float32)
    if WINDOW:
        weight_x_NP = tl.load(weight_ptr + x_NP % window, mask=inside_NP, other=0.0)

    gx_part, s_above = _line(plane_ptr, y_N - 1, height, img_h, left_NP, middle_NP, right_NP, inside_NP)
    d_last, s_last = _line(plane_ptr, y_N, height, img_h, left_NP, middle_NP, right_NP, inside_NP)
    gx_part += 2.0 * d_last
    zero = tl.zeros([CELLS, ACROSS], tl.int32)
    # of magnitudes whose level is at least 0..4; of those below level 4 with opposite signs, at least 0..3
    from0, from1, from2, from3, from4 = zero, zero, zero, zero, zero
    opposed0, opposed1, opposed2, opposed3 = zero, zero, zero, zero
    for y in range(CELL):
        d, s = _line(plane_ptr, y_N + y + 1, height, img_h, left_NP, middle_NP, right_NP, inside_NP)
        gx, gy = gx_part + d, s_above - s
        gx_part = d_last + 2.0 * d
        d_last = d
        s_above = s_last
        s_last = s
        scale = unit
        if WINDOW:
            scale = tl.load(weight_ptr + (y_N + y) % window)[:, None] * weight_x_NP
        size = (tl.sqrt_rn(gx * gx + gy * gy) * scale).to(tl.int32)
        across, along = tl.abs(gx), tl.abs(gy)
        level4 = across >= along * TAN_80
        opposed = tl.where((gx * gy < 0.0) & (across < along * TAN_80), size, 0)
        level1, level2, level3 = across >= along * TAN_20, across >= along * TAN_40, across >= along * TAN_60
        from0 += size
        from1 += tl.where(level1, size, 0)
        from2 += tl.where(level2, size, 0)
        from3 += tl.where(level3, size, 0)
        from4 += tl.where(level4, size, 0)
        opposed0 += opposed
        opposed1 += tl.where(level1, opposed, 0)
        opposed2 += tl.where(level2, opposed, 0)
        opposed3 += tl.where(level3, opposed, 0)
    at8, at7, at6, at5 = opposed0 - opposed1, opposed1 - opposed2, opposed2 - opposed3, opposed3
    h0, h1 = tl.sum(from0 - from1 - at8, 1), tl.sum(from1 - from2 - at7, 1)
    h2, h3 = tl.sum(from2 - from3 - at6, 1), tl.sum(from3 - from4 - at5, 1)
    h4, h5, h6, h7, h8 = tl.sum(from4, 1), tl.sum(at5, 1), tl.sum(at6, 1), tl.sum(at7, 1), tl.sum(at8, 1)
    factor_N = tl.zeros([CELLS], tl.float32) + tl.where(c == 0, factor_0, tl.where(c == 1, factor_1, factor_2))
    if NORMALIZE:
        squares_N = _square(h0) + _square(h1) + _square(h2) + _square(h3) + _square(h4)
        squares_N += _square(h5) + _square(h6) + _square(h7) + _square(h8)
        norm_N = tl.sqrt_rn(squares_N.to(tl.float32))
        factor_N = tl.div_rn(tl.full([CELLS], 1.0, tl.float32), tl.maximum(norm_N, 1.0))
    to_ptr = out_ptr + at_N
    _store(to_ptr, h0, factor_N, fits_N)
    _store(to_ptr + step, h1, factor_N, fits_N)
    _store(to_ptr + 2 * step, h2, factor_N, fits_N)
    _store(to_ptr + 3 * step, h3, factor_N, fits_N)
    _store(to_ptr + 4 * step, h4, factor_N, fits_N)
    _store(to_ptr + 5 * step, h5, factor_N, fits_N)
    _store(to_ptr + 6 * step, h6, factor_N, fits_N)
    _store(to_ptr + 7 * step, h7, factor_N, fits_N)
    _store(to_ptr + 8 * step, h8, factor_N, fits_N)


@triton.jit
def _square(x):
    return x.to(tl.int64) * x.to(tl.int64)


@triton.jit
def _store(to_ptr, x_N, factor_N, fits_N):
    tl.store(to_ptr, (x_N.to(tl.float32) * factor_N).to(to_ptr.dtype.element_ty), mask=fits_N)


def hog(
    img: Tensor, index: Tensor | None, cell: int, normalize: bool, stride: int, unit: float, weights: list[float],
    factor: list[float], out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`; the indices are contiguous, on its device. stride 0 is the dense layout."""
    B, _, H, W = img.shape
    side = max(stride // cell, 1)
    rows = (H // cell) * (W // cell) if stride == 0 else out.shape[1]
    across, cells = tiling(cell)
    some = out if index is None else index  # what is not read still needs a pointer
    side_G = torch.stack([torch.full((), v, device=img.device) for v in weights]) if weights else some
    with torch.cuda.device_of(img):
        hog_kernel[(triton.cdiv(rows * side * side, cells), 3 * B)](
            img, some, side_G, out, rows, H, W, max(len(weights), 1), *img.stride(), unit, *factor,
            CELL=cell, ACROSS=across, CELLS=cells, SIDE=side, DENSE=stride == 0, PICKED=index is not None,
            NORMALIZE=normalize, WINDOW=bool(weights), num_warps=4,
        )  # fmt: skip


def tiling(cell: int) -> tuple[int, int]:
    """Lanes for the pixels across a cell, and cells of a program."""
    across = triton.next_power_of_2(cell)
    return across, max(TILE // across, 1)


def _aot(out: str, cell: int = 8, side: int = 2, **changes: bool | int) -> tuple:
    """One compilation as training makes it: dense NCHW images unless the strides are changed."""
    across, cells = tiling(cell)
    types = {"img_ptr": "*u8", "index_ptr": "*i64", "weight_ptr": "*fp32", "out_ptr": out, "R": "i32"}
    types |= dict.fromkeys(("height", "width", "img_b", "img_c", "img_h"), "i32:16") | {"window": "i32"}
    types |= dict.fromkeys(("unit", "factor_0", "factor_1", "factor_2"), "fp32")
    constants = {"img_w": 1, "CELL": cell, "ACROSS": across, "CELLS": cells, "SIDE": side, "NORMALIZE": True}
    constants |= dict.fromkeys(("DENSE", "PICKED", "WINDOW"), False) | changes
    return hog_kernel, {k: v for k, v in types.items() if k not in constants}, constants, 4


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    "bf16-picked": _aot("*bf16", PICKED=True),
    "fp32-dense": _aot("*fp32", DENSE=True, side=1),
    "fp32-raw-32": _aot("*fp32", side=4, NORMALIZE=False),
    "fp32-window": _aot("*fp32", WINDOW=True),
    "bf16-cell-7-nhwc": _aot("*bf16", cell=7, img_w=3, img_c=1),
}
