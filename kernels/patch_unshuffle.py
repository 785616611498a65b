"""Decoder sequence from visible tokens, mask token and positions in one pass, and its gradients in one pass.

Work, forward: one program writes BLOCK_T rows x BLOCK_D columns of one image; a row reads its visible token or the mask
token (which stays in cache) and its position.
Work, backward: one program takes BLOCK_T places x BLOCK_D columns of a chunk of images, copies the rows of visible
tokens out and adds up the rest: the mask token's gradient over hidden rows, the positions' over images.
Bytes, B = 256, L = 196, K = 49, D = 512, bf16: forward 13 MB read, 52 MB written; backward 52 MB read, 13 MB written
twice (rows of `d_visible` that no token names must be 0, so it is cleared first).
fp32: everything between load and store, and the partial sums.
Deterministic: one writer per element, no atomics; each program adds in the order of its images, torch adds the partial
sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 4  # rows of a program; 4 x 512 elements are 16 per lane with 4 warps
COLUMNS = 512  # most columns of a program
CHUNK = 16  # most images that one program of the backward adds up


@triton.jit
def unshuffle_fwd_kernel(
    visible_ptr,  # [B, S + K, D] floating point, any strides; only rows of visible tokens are read
    mask_ptr,  # [D] floating point, contiguous
    inverse_ptr,  # [B, L] int64, any strides
    pos_ptr,  # [T, D] floating point, contiguous; read if POS
    out_ptr,  # [B, T, D] floating point, contiguous, fully written
    T, K, D,
    visible_b, visible_t, visible_d, inverse_b, inverse_l,  # strides in elements
    PREFIX: tl.constexpr, POS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t_T = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_T, inside_D = t_T < T, d_D < D
    inside_TD = inside_T[:, None] & inside_D[None, :]

    l_T = (t_T - PREFIX).to(tl.int64)
    place_T = tl.load(inverse_ptr + b * inverse_b + l_T * inverse_l, mask=inside_T & (l_T >= 0), other=-1)
    shown_T = (place_T >= 0) & (place_T < K)
    source_T = tl.where(l_T < 0, t_T.to(tl.int64), PREFIX + place_T)
    shown_T = shown_T | (l_T < 0)
    at_TD = b * visible_b + source_T[:, None] * visible_t + d_D.to(tl.int64)[None, :] * visible_d
    row_TD = tl.load(visible_ptr + at_TD, mask=shown_T[:, None] & inside_TD, other=0.0).to(tl.float32)
    mask_D = tl.load(mask_ptr + d_D, mask=inside_D, other=0.0).to(tl.float32)
    x_TD = tl.where(shown_T[:, None], row_TD, mask_D[None, :])
    if POS:
        x_TD += tl.load(pos_ptr + t_T[:, None] * D + d_D[None, :], mask=inside_TD, other=0.0).to(tl.float32)
    to_TD = (b * T + t_T)[:, None] * D + d_D[None, :]
    tl.store(out_ptr + to_TD, x_TD.to(out_ptr.dtype.element_ty), mask=inside_TD)


@triton.jit
def unshuffle_bwd_kernel(
    upstream_ptr,  # [B, T, D] floating point, any strides
    inverse_ptr,  # [B, L] int64, any strides
    visible_ptr,  # [B, S + K, D] gradient of visible, contiguous; rows that a token names are written
    mask_ptr,  # [chunks * tiles, D] fp32, contiguous, fully written if MASK; adds up to the gradient of mask_token
    pos_ptr,  # [chunks, T, D] fp32, contiguous, fully written if POS; adds up to the gradient of pos
    B, T, K, D, CHUNK,
    upstream_b, upstream_t, upstream_d, inverse_b, inverse_l,  # strides in elements
    PREFIX: tl.constexpr, MASK: tl.constexpr, POS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    t_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_T, inside_D = t_T < T, d_D < D
    inside_TD = inside_T[:, None] & inside_D[None, :]
    l_T = (t_T - PREFIX).to(tl.int64)
    from_TD = t_T.to(tl.int64)[:, None] * upstream_t + d_D.to(tl.int64)[None, :] * upstream_d

    mask_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    pos_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    first = chunk * CHUNK
    for image in range(first, tl.minimum(first + CHUNK, B)):
        b = tl.cast(image, tl.int64)
        place_T = tl.load(inverse_ptr + b * inverse_b + l_T * inverse_l, mask=inside_T & (l_T >= 0), other=-1)
        shown_T = (place_T >= 0) & (place_T < K)
        prefix_T = l_T < 0
        grad_TD = tl.load(upstream_ptr + b * upstream_b + from_TD, mask=inside_TD, other=0.0)
        row_T = b * (PREFIX + K) + tl.where(prefix_T, t_T.to(tl.int64), PREFIX + place_T)
        wanted_TD = (shown_T | prefix_T)[:, None] & inside_TD
        value_TD = grad_TD.to(visible_ptr.dtype.element_ty)
        tl.store(visible_ptr + row_T[:, None] * D + d_D[None, :], value_TD, mask=wanted_TD)
        if MASK:
            mask_TD += tl.where(wanted_TD, 0.0, grad_TD.to(tl.float32))
        if POS:
            pos_TD += grad_TD.to(tl.float32)
    if MASK:
        to_D = (chunk * tiles + tile).to(tl.int64) * D + d_D
        tl.store(mask_ptr + to_D, tl.sum(mask_TD, axis=0), mask=inside_D)
    if POS:
        to_TD = (chunk.to(tl.int64) * T + t_T)[:, None] * D + d_D[None, :]
        tl.store(pos_ptr + to_TD, pos_TD, mask=inside_TD)


def patch_unshuffle_fwd(
    visible: Tensor, mask_token: Tensor, inverse: Tensor, pos: Tensor | None, prefix: int, dtype: torch.dtype
) -> Tensor:
    B, rows, D = visible.shape
    T, block = prefix + inverse.shape[1], columns(D)
    out = torch.empty((B, T, D), dtype=dtype, device=visible.device)
    if out.numel() == 0:
        return out
    mask_token = mask_token.contiguous()
    where = mask_token if pos is None else pos.contiguous()
    with torch.cuda.device_of(visible):
        unshuffle_fwd_kernel[(B * triton.cdiv(T, BLOCK_T), triton.cdiv(D, block))](
            visible, mask_token, inverse, where, out, T, rows - prefix, D, *visible.stride(), *inverse.stride(),
            PREFIX=prefix, POS=pos is not None, BLOCK_T=BLOCK_T, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return out


def patch_unshuffle_bwd(
    upstream: Tensor, inverse: Tensor, rows: int, prefix: int, visible: torch.dtype, mask_token: bool, pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of visible, in the type given, and of mask_token and pos, in fp32 and (0,) where not asked for."""
    B, T, D = upstream.shape
    device, block = upstream.device, columns(D)
    # images per program: enough programs for a large GPU, from the batch alone so that the order of adding is fixed
    chunk = max(1, min(CHUNK, B // 8))
    chunks, tiles = triton.cdiv(B, chunk), triton.cdiv(T, BLOCK_T)
    d_visible = torch.zeros((B, rows, D), dtype=visible, device=device)
    mask = torch.empty((chunks * tiles, D) if mask_token else (0,), dtype=torch.float32, device=device)
    place = torch.empty((chunks, T, D) if pos else (0,), dtype=torch.float32, device=device)
    if upstream.numel():
        with torch.cuda.device_of(upstream):
            unshuffle_bwd_kernel[(chunks * tiles, triton.cdiv(D, block))](
                upstream, inverse, d_visible, mask, place, B, T, rows - prefix, D, chunk,
                *upstream.stride(), *inverse.stride(),
                PREFIX=prefix, MASK=mask_token, POS=pos, BLOCK_T=BLOCK_T, BLOCK_D=block, num_warps=4,
            )  # fmt: skip
    return d_visible, mask.sum(0) if mask_token else mask, place.sum(0) if pos else place


def columns(D: int) -> int:
    """Columns of a program: a power of two that divides D where one of a useful size does, so that no lane idles."""
    fits = [c for c in (512, 256, 128) if D % c == 0]
    return fits[0] if fits else min(COLUMNS, triton.next_power_of_2(D))


def _fwd(visible: str, table: str, out: str, D: int, pos: bool) -> tuple:
    """One compilation as training makes it: dense tokens behind a class token."""
    types = {"visible_ptr": visible, "mask_ptr": table, "inverse_ptr": "*i64", "pos_ptr": table, "out_ptr": out}
    types |= {"T": "i32", "K": "i32", "D": "i32:16", "visible_b": "i32:16", "visible_t": "i32:16", "inverse_b": "i32"}
    constants = {"visible_d": 1, "inverse_l": 1, "PREFIX": 1, "POS": pos, "BLOCK_T": BLOCK_T, "BLOCK_D": columns(D)}
    return unshuffle_fwd_kernel, types, constants, 4


def _bwd(upstream: str, visible: str, D: int, pos: bool) -> tuple:
    types = {"upstream_ptr": upstream, "inverse_ptr": "*i64", "visible_ptr": visible, "mask_ptr": "*fp32"}
    types |= {"pos_ptr": "*fp32", **dict.fromkeys(("B", "T", "K", "CHUNK", "inverse_b"), "i32")}
    types |= dict.fromkeys(("D", "upstream_b", "upstream_t"), "i32:16")
    constants = {"upstream_d": 1, "inverse_l": 1, "PREFIX": 1, "MASK": True, "POS": pos}
    return unshuffle_bwd_kernel, types, constants | {"BLOCK_T": BLOCK_T, "BLOCK_D": columns(D)}, 4


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    "fwd-bf16-512": _fwd("*bf16", "*bf16", "*bf16", 512, True),
    "fwd-bf16-fp32-512": _fwd("*bf16", "*fp32", "*fp32", 512, True),
    "fwd-fp32-768-plain": _fwd("*fp32", "*fp32", "*fp32", 768, False),
    "bwd-bf16-512": _bwd("*bf16", "*bf16", 512, False),
    "bwd-fp32-bf16-512": _bwd("*fp32", "*bf16", 512, False),
    "bwd-fp32-768-pos": _bwd("*fp32", "*fp32", 768, True),
}
