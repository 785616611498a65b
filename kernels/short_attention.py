"""Attention inside many short groups of tokens, a whole group on chip, from packed q, k, v to merged heads, in place.

Work: one program takes one head of one group. Keys and values are one tile of KEYS rows, read once; queries follow in
blocks of BLOCK_M rows. Programs of one group are neighbours, so that heads narrower than a cache line meet in L2. Tiny
groups get one warp per program and are not merged: 32 programs on a multiprocessor keep 32 * N * 3 * d * 2 bytes in
flight (86 KB at N = 7, d = 64), three times what an H200's memory needs, and no group's rounding depends on another.
Bytes, u = tokens * D * 2 for half types: forward q, k, v in and the result out, 4u; backward q, k, v, dO in and dq, dk,
dv out, 7u.
Backward: the scores are recomputed, and delta = rowsum(P * dP) is a sum over registers, so neither the result nor row
sums of the forward are kept. Scores are transposed, [keys, queries]: their tiles are then operands of dV and dK as they
are. Groups whose dK and dV fill the registers (KEYS * PAD > 8192) take two launches, 7 products instead of 5: the first
writes dq, row sums and delta (8 bytes per query), the second dk and dv by blocks of keys.
fp32: scores, softmax, delta and every accumulator; probabilities and dS are rounded to the type of qkv for the
products, which for fp32 itself are made without tensor cores and without rounding.
Deterministic: one writer per element, no atomics, one fixed order of sums.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LENGTH = 256  # tokens of a group: one tile of keys
HEADS = (16, 128)  # values of a head, from and to
WIDE_TILE = 8192  # float32 keys of a group, tokens x values of a head as powers of 2: more of them spill
STEADY = ["groups", "length", "tokens", "heads"]  # not worth a compilation of their own when 1 or a multiple of 16


# Where a group lies: two small functions handed to the kernels. EXTENT(group, ...) gives its image, its first row there
# (both 64-bit) and its number of tokens; PLACE(group, i, ...) the rows of its tokens i, counted from that row.
@triton.jit
def fixed_extent(group, geometry_ptr, groups, length, tokens):
    """Group = image, all of `length` tokens."""
    return group, group * 0, length


@triton.jit
def packed_extent(group, geometry_ptr, groups, length, tokens):
    """Groups end to end in one image of `tokens` rows. geometry is cu_seqlens, held inside 0..tokens for safe reads."""
    first = tl.load(geometry_ptr + group).to(tl.int64)
    last = tl.load(geometry_ptr + tl.minimum(group + 1, groups)).to(tl.int64)
    first = tl.where(group == 0, 0, tl.minimum(tl.maximum(first, 0), tokens))
    return group * 0, first, (tl.minimum(tl.maximum(last, first), tokens) - first).to(tl.int32)


@triton.jit
def in_order(group, i, geometry_ptr):
    """Tokens one after the other."""
    return i


@triton.jit
def fill_orphans(
    ptr, pitch, group, groups, first, n, tokens, LIMIT: tl.constexpr, HEAD: tl.constexpr, PAD: tl.constexpr
):
    """Packed rows that no group computes: 0 behind the last one (group == groups), NaN in one longer than promised."""
    begin = tl.where((group == groups) | (n > LIMIT), first, tokens)
    end = tl.where(group == groups, tokens, first + n)
    value = tl.where(group == groups, 0.0, float("nan"))
    column = tl.arange(0, PAD)
    for row in range(begin, end):
        tl.store(ptr + row * pitch + column, (column * 0.0 + value).to(ptr.dtype.element_ty), mask=column < HEAD)


@triton.jit
def load_rows(ptr, at_R, inside_R, column, HEAD: tl.constexpr, PAD: tl.constexpr):
    """[rows, PAD] from a column of a head on; 0 outside the group and outside the head."""
    d = column + tl.arange(0, PAD)
    inside = inside_R[:, None]
    if HEAD % PAD != 0:
        inside = inside & (d < HEAD)[None, :]
    return tl.load(ptr + at_R[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, at_R, inside_R, column, values, HEAD: tl.constexpr, PAD: tl.constexpr):
    """The counterpart of load_rows."""
    d = column + tl.arange(0, PAD)
    inside = inside_R[:, None]
    if HEAD % PAD != 0:
        inside = inside & (d < HEAD)[None, :]
    tl.store(ptr + at_R[:, None] + d[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=STEADY)
def short_attention_fwd_kernel(
    qkv_ptr,  # [B, N, 3, heads, HEAD], or [T, 3, heads, HEAD] if PACKED; rows dense, any pitch
    geometry_ptr,  # what EXTENT and PLACE read: cu_seqlens [groups + 1] int32 if PACKED, else None
    out_ptr,  # [B, N, heads, HEAD] or [T, heads, HEAD], type of qkv, fully written
    groups, length, tokens, heads,  # length: tokens per group unless PACKED; tokens: rows per image
    scale,  # of the scores, times log2(e): exponentials are base 2
    qkv_b, qkv_t, out_b, out_t,  # pitch of an image and of a row, in elements
    HEAD: tl.constexpr, PAD: tl.constexpr,  # values of a head, and the power of 2 that holds them
    KEYS: tl.constexpr, BLOCK_M: tl.constexpr, EXTENT: tl.constexpr, PLACE: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, head = program // heads, program % heads
    image, first, n = EXTENT(group, geometry_ptr, groups, length, tokens)
    if PACKED:
        fill_orphans(out_ptr + head * HEAD, out_t, group, groups, first, n, tokens, KEYS, HEAD, PAD)
        n = tl.where(n > KEYS, 0, n)
    q_ptr = qkv_ptr + image * qkv_b + first * qkv_t + head * HEAD
    k_ptr, v_ptr = q_ptr + heads * HEAD, q_ptr + 2 * heads * HEAD
    out_ptr += image * out_b + first * out_t + head * HEAD

    key_N = tl.arange(0, KEYS)
    at_N = PLACE(group, key_N, geometry_ptr) * qkv_t
    if RESIDENT:
        k = load_rows(k_ptr, at_N, key_N < n, 0, HEAD, PAD)
        v = load_rows(v_ptr, at_N, key_N < n, 0, HEAD, PAD)
    for start in tl.range(0, n, BLOCK_M, num_stages=STAGES):
        query_M = start + tl.arange(0, BLOCK_M)
        token_M = PLACE(group, query_M, geometry_ptr)
        q = load_rows(q_ptr, token_M * qkv_t, query_M < n, 0, HEAD, PAD)
        if not RESIDENT:
            k = load_rows(k_ptr, at_N, key_N < n, 0, HEAD, PAD)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where((key_N < n)[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])
        total_M = tl.sum(p, axis=1)
        if not RESIDENT:
            v = load_rows(v_ptr, at_N, key_N < n, 0, HEAD, PAD)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total_M[:, None]
        store_rows(out_ptr, token_M * out_t, query_M < n, 0, out, HEAD, PAD)


@triton.jit(do_not_specialize=STEADY)
def short_attention_bwd_kernel(
    qkv_ptr, geometry_ptr,  # as forward
    grad_ptr,  # gradient of the result, its shape and type; rows dense, any pitch
    d_qkv_ptr,  # gradient of qkv, its shape and type; D_Q writes a third, D_KV two thirds
    rows_ptr,  # [groups, heads, 2, LIMIT] fp32: log2 of the row sums, delta. Written by D_Q alone, read by D_KV alone
    groups, length, tokens, heads,
    scale, log2_scale,  # of the scores, and the same times log2(e)
    qkv_b, qkv_t, grad_b, grad_t, d_b, d_t,
    HEAD: tl.constexpr, PAD: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_M: tl.constexpr, EXTENT: tl.constexpr, PLACE: tl.constexpr,
    PACKED: tl.constexpr, STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,  # keys and values stay on chip; else (D_Q alone) each step reads them, by halves of a head
    LIMIT: tl.constexpr,  # the longest group. KEYS hold it, unless D_KV is alone and program_id(1) counts blocks
    D_Q: tl.constexpr, D_KV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, head = program // heads, program % heads
    image, first, n = EXTENT(group, geometry_ptr, groups, length, tokens)
    if PACKED:
        if D_Q:
            for part in tl.static_range(3):
                ptr = d_qkv_ptr + (part * heads + head) * HEAD
                fill_orphans(ptr, d_t, group, groups, first, n, tokens, LIMIT, HEAD, PAD)
        n = tl.where(n > LIMIT, 0, n)
    q_ptr = qkv_ptr + image * qkv_b + first * qkv_t + head * HEAD
    k_ptr, v_ptr = q_ptr + heads * HEAD, q_ptr + 2 * heads * HEAD
    grad_ptr += image * grad_b + first * grad_t + head * HEAD
    d_q_ptr = d_qkv_ptr + image * d_b + first * d_t + head * HEAD
    d_k_ptr, d_v_ptr = d_q_ptr + heads * HEAD, d_q_ptr + 2 * heads * HEAD
    if not (D_Q and D_KV):
        rows_ptr += program * 2 * LIMIT

    key_N = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    token_N = PLACE(group, key_N, geometry_ptr)
    if RESIDENT:
        k = load_rows(k_ptr, token_N * qkv_t, key_N < n, 0, HEAD, PAD)
        v = load_rows(v_ptr, token_N * qkv_t, key_N < n, 0, HEAD, PAD)
    d_k = tl.zeros([KEYS, PAD], tl.float32)
    d_v = tl.zeros([KEYS, PAD], tl.float32)
    for start in tl.range(0, n, BLOCK_M, num_stages=STAGES):
        query_M = start + tl.arange(0, BLOCK_M)
        inside_M = query_M < n
        token_M = PLACE(group, query_M, geometry_ptr)
        if RESIDENT:
            q = load_rows(q_ptr, token_M * qkv_t, inside_M, 0, HEAD, PAD)
            grad = load_rows(grad_ptr, token_M * grad_t, inside_M, 0, HEAD, PAD)
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            d_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
        else:
            s = tl.zeros([KEYS, BLOCK_M], tl.float32)
            d_p = tl.zeros([KEYS, BLOCK_M], tl.float32)
            for c in tl.range(0, PAD, PAD // 2, num_stages=1):
                k = load_rows(k_ptr, token_N * qkv_t, key_N < n, c, HEAD, PAD // 2)
                q = load_rows(q_ptr, token_M * qkv_t, inside_M, c, HEAD, PAD // 2)
                s = tl.dot(k, tl.trans(q), s, input_precision="ieee")
                v = load_rows(v_ptr, token_N * qkv_t, key_N < n, c, HEAD, PAD // 2)
                grad = load_rows(grad_ptr, token_M * grad_t, inside_M, c, HEAD, PAD // 2)
                d_p = tl.dot(v, tl.trans(grad), d_p, input_precision="ieee")
        s = tl.where((key_N < n)[:, None], s * log2_scale, float("-inf"))
        if D_Q:
            top_M = tl.max(s, axis=0)
            p = tl.exp2(s - top_M[None, :])
            total_M = tl.sum(p, axis=0)
            p = p / total_M[None, :]
            delta_M = tl.sum(p * d_p, axis=0)
            if not D_KV:
                tl.store(rows_ptr + query_M, top_M + tl.log2(total_M), mask=inside_M)
                tl.store(rows_ptr + LIMIT + query_M, delta_M, mask=inside_M)
        else:
            p = tl.exp2(s - tl.load(rows_ptr + query_M, mask=inside_M, other=float("inf"))[None, :])
            delta_M = tl.load(rows_ptr + LIMIT + query_M, mask=inside_M, other=0.0)
        if D_KV:  # before dS: then it and the probabilities do not have to stay side by side
            d_v = tl.dot(p.to(qkv_ptr.dtype.element_ty), grad, d_v, input_precision="ieee")
        d_s = (p * (d_p - delta_M[None, :])).to(qkv_ptr.dtype.element_ty)
        if D_KV:
            d_k = tl.dot(d_s, q, d_k, input_precision="ieee")
        if D_Q:
            if RESIDENT:
                d_q = tl.dot(tl.trans(d_s), k, input_precision="ieee") * scale
                store_rows(d_q_ptr, token_M * d_t, inside_M, 0, d_q, HEAD, PAD)
            else:
                for c in tl.range(0, PAD, PAD // 2, num_stages=1):
                    k = load_rows(k_ptr, token_N * qkv_t, key_N < n, c, HEAD, PAD // 2)
                    d_q = tl.dot(tl.trans(d_s), k, input_precision="ieee") * scale
                    store_rows(d_q_ptr, token_M * d_t, inside_M, c, d_q, HEAD, PAD // 2)
    if D_KV:
        store_rows(d_k_ptr, token_N * d_t, key_N < n, 0, d_k * scale, HEAD, PAD)
        store_rows(d_v_ptr, token_N * d_t, key_N < n, 0, d_v, HEAD, PAD)


class Tile(NamedTuple):
    """How one launch cuts a group: rows of keys and of queries per step, warps, loads in flight, keys kept on chip."""

    keys: int
    block: int
    warps: int
    stages: int = 1
    resident: bool = True


def forward_tile(limit: int, head: int, size: int) -> Tile:
    """For groups of up to `limit` tokens, `head` values per head of `size` bytes. Chosen so that nothing spills."""
    keys, pad = tile_shape(limit, head)
    if size == 4:
        return Tile(keys, 16, scalar_warps(keys * pad))
    if keys * pad > 16384:
        return Tile(keys, 32, 8, resident=False)
    # from 64 queries on, Hopper multiplies by warp groups
    return Tile(keys, 32 if keys * pad > 8192 and keys == 256 else min(keys, 64), min(4, keys // 16))


def backward_tiles(limit: int, head: int, size: int) -> list[Tile]:
    """One launch, or two: dq, then dk and dv."""
    keys, pad = tile_shape(limit, head)
    if size == 4:
        warps = scalar_warps(keys * pad)
        if keys * pad <= 4096:  # with loads in flight ptxas has less to hoist, and does not spill what it hoists
            return [Tile(keys, 16, warps, stages=2)]
        return [Tile(keys, 16, warps), Tile(4096 // pad, 16, 8)]
    if keys * pad <= 8192:
        few = keys // 16 if pad < 128 else keys // 8
        return [Tile(keys, min(keys, 32), min(few, 8 if keys == 256 or keys * pad > 4096 else 4))]
    resident = keys * pad <= 16384
    return [Tile(keys, 32 if resident else 16, 8, resident=resident), Tile(8192 // pad, 32, 8)]


def scalar_warps(values: int) -> int:
    """float32 is multiplied without tensor cores, whose operands then sit in registers."""
    return max(1, min(8, values // 512))


def tile_shape(limit: int, head: int) -> tuple[int, int]:
    """Rows of keys and columns of a head, as powers of 2."""
    return max(16, triton.next_power_of_2(limit)), max(16, triton.next_power_of_2(head))


def short_attention_fwd(qkv: Tensor, cu_seqlens: Tensor | None, heads: int, limit: int, scale: float) -> Tensor:
    """(B, N, 3D) -> (B, N, D), or packed (T, 3D) -> (T, D); `limit` bounds the groups of a packed call."""
    qkv, head = _dense(qkv), qkv.shape[-1] // (3 * heads)
    out = qkv.new_empty(*qkv.shape[:-1], heads * head)
    sizes, limit = _sizes(qkv, cu_seqlens, limit)
    tile = forward_tile(limit, head, qkv.element_size())
    if out.numel():
        with torch.cuda.device_of(qkv):
            short_attention_fwd_kernel[(_programs(sizes, cu_seqlens, heads),)](
                qkv, cu_seqlens, out, *sizes, heads, scale * math.log2(math.e), *_pitches(qkv), *_pitches(out),
                **_constants(head, tile, cu_seqlens is not None),
            )  # fmt: skip
    return out


def short_attention_bwd(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor | None, heads: int, limit: int, scale: float
) -> Tensor:
    """The gradient of qkv, contiguous."""
    grad, qkv, head = _dense(grad), _dense(qkv), qkv.shape[-1] // (3 * heads)
    d_qkv = qkv.new_empty(qkv.shape)
    sizes, limit = _sizes(qkv, cu_seqlens, limit)
    tiles = backward_tiles(limit, head, qkv.element_size())
    programs, keys = _programs(sizes, cu_seqlens, heads), tiles[0].keys
    # row sums and delta, from the first launch to the second
    rows = None if len(tiles) == 1 else qkv.new_empty((programs, 2, keys), dtype=torch.float32)
    for i, tile in enumerate(tiles if d_qkv.numel() else ()):
        with torch.cuda.device_of(qkv):
            short_attention_bwd_kernel[(programs, triton.cdiv(limit, tile.keys))](
                qkv, cu_seqlens, grad, d_qkv, rows, *sizes, heads, scale, scale * math.log2(math.e),
                *_pitches(qkv), *_pitches(grad), *_pitches(d_qkv), LIMIT=keys, D_Q=i == 0, D_KV=i == len(tiles) - 1,
                **_constants(head, tile, cu_seqlens is not None),
            )  # fmt: skip
    return d_qkv


def _dense(x: Tensor) -> Tensor:
    # inside a group rows are counted in 32 bits, which saves registers; a pitch beyond that is copied together
    return x if x.stride(-1) == 1 and x.stride(-2) * MAX_LENGTH < 2**31 else x.contiguous()


def _sizes(qkv: Tensor, cu_seqlens: Tensor | None, limit: int) -> tuple[tuple[int, int, int], int]:
    """(groups, tokens of each, rows per image) and the longest group."""
    tokens = qkv.shape[-2]
    if cu_seqlens is None:
        return (qkv.shape[0], tokens, tokens), tokens
    return (cu_seqlens.shape[0] - 1, 0, tokens), limit


def _programs(sizes: tuple[int, int, int], cu_seqlens: Tensor | None, heads: int) -> int:
    return (sizes[0] + (cu_seqlens is not None)) * heads  # packed: one more for the rows behind the last group


def _pitches(x: Tensor) -> tuple[int, int]:
    return (x.stride(0) if x.ndim == 3 else 0), x.stride(-2)


def _constants(head: int, tile: Tile, packed: bool) -> dict:
    extent = packed_extent if packed else fixed_extent
    return {
        "HEAD": head, "PAD": max(16, triton.next_power_of_2(head)), "KEYS": tile.keys, "BLOCK_M": tile.block,
        "EXTENT": extent, "PLACE": in_order, "PACKED": packed, "STAGES": tile.stages, "RESIDENT": tile.resident,
        "num_warps": tile.warps,
    }  # fmt: skip


def _aot(kind: str, limit: int, head: int, packed: bool = False) -> dict[str, tuple]:
    """The launches of one shape as a dense projection makes them: every pitch a multiple of 16."""
    size = 4 if kind == "fp32" else 2
    types = {"qkv_ptr": f"*{kind}", **dict.fromkeys(STEADY, "i32"), **dict.fromkeys(("qkv_b", "qkv_t"), "i32:16")}
    types |= {"scale": "fp32"} | ({"geometry_ptr": "*i32"} if packed else {})
    fwd_types = types | {"out_ptr": f"*{kind}", "out_b": "i32:16", "out_t": "i32:16"}
    bwd_types = types | dict.fromkeys(("grad_ptr", "d_qkv_ptr"), f"*{kind}") | {"log2_scale": "fp32"}
    bwd_types |= dict.fromkeys(("grad_b", "grad_t", "d_b", "d_t"), "i32:16")
    forward, backward = forward_tile(limit, head, size), backward_tiles(limit, head, size)
    found = {"fwd": (short_attention_fwd_kernel, fwd_types, _constants(head, forward, packed))}
    for i, tile in enumerate(backward):
        last = i == len(backward) - 1
        constants = _constants(head, tile, packed) | {"LIMIT": backward[0].keys, "D_Q": i == 0, "D_KV": last}
        if len(backward) == 1:
            found["bwd"] = (short_attention_bwd_kernel, bwd_types, constants | {"rows_ptr": None})
        else:
            found["dkv" if last else "dq"] = (short_attention_bwd_kernel, bwd_types | {"rows_ptr": "*fp32"}, constants)
    specs = {}
    for part, (kernel, of_types, constants) in found.items():
        warps = constants.pop("num_warps")
        absent = {} if packed else {"geometry_ptr": None}
        specs[f"{part}-{kind}-{'packed' if packed else limit}-{head}"] = (kernel, of_types, constants | absent, warps)
    return specs


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    **_aot("bf16", 50, 64), **_aot("bf16", 197, 32), **_aot("bf16", 49, 32), **_aot("bf16", 98, 24),
    **_aot("bf16", 197, 64), **_aot("fp16", 197, 80), **_aot("bf16", 16, 128), **_aot("bf16", 65, 64, packed=True),
    **_aot("fp32", 50, 64), **_aot("fp32", 197, 32),
}  # fmt: skip
