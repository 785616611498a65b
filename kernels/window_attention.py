"""Attention inside the shifted windows of a map: whole windows on chip, read and written in image order.

Work: a program is pinned to one head and one block of queries and walks through windows `part`, `part + parts`, ...,
so that the bias of its block is gathered once and stays in registers, and so does the gradient of the bias. Programs of
the same windows are neighbours: the blocks of a head, which share keys and values, then the heads, which share cache
lines.
Bytes, u = tokens * C * 2 for half types: forward q, k, v in and the result out, 4u; backward 7u. Windows of more than
one block of queries read keys and values once per block, from L2.
Roll, cut, padding, mask and the way back are arithmetic on the number of a token in its window; nothing is copied and
no mask is stored. Scores are transposed, [keys, queries]: as in short_attention's backward their tiles are operands as
they are, and what belongs to a key is spread over all warps, which is less to hold for each.
Backward: up to 64 tokens and half types, one launch with 5 products. Else two with 7: the first writes dq, row sums and
delta (8 bytes per query) and has the gradient of the bias, the second dk and dv by blocks of keys.
Gradient of the table: dS is added up in float32 over the windows of a program; each program writes its sums, and a last
kernel adds them in the order of the programs and folds the pairs of each offset. The number of programs depends on the
shape alone, so results repeat to the bit, also on another card.
fp32: scores, softmax, delta and every accumulator; probabilities and dS are rounded to the type of qkv for products.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimfast.kernels.windows import (
    inverse_norms,
    load_bias,
    load_ids,
    load_projected,
    load_rows,
    locate,
    restrict,
    store_rows,
    through_norm,
)

MAX_TOKENS = 256  # of a window: one tile of keys
HEADS = (16, 64)  # values of a head, from and to
LOG2E = math.log2(math.e)
WIDE_TILE = {2: 8192, 4: 4096}  # keys by their bytes, tokens x values of a head as powers of 2: more of them spill
PROGRAMS = 512  # to aim at: two to four for each multiprocessor of a large card
STEADY = ["windows", "parts", "heads", "rows", "cols", "across", "per_image", "shift_y", "shift_x"]


@triton.jit(do_not_specialize=STEADY)
def window_attention_fwd_kernel(
    qkv_ptr,  # [B, H, W, 3, heads, HEAD]; rows dense
    table_ptr,  # [(2 WH - 1) * (2 WW - 1), heads], read if TABLE
    bias_ptr,  # [3, heads, HEAD], read if PADDED
    group_ptr,  # [B or 1, H, W] int32, dense, read if GROUPED
    head_scale_ptr,  # [heads] fp32, read if COSINE: instead of `scale`
    out_ptr,  # [B, H, W, heads, HEAD], dense, type of qkv, fully written
    windows, parts, heads, rows, cols, across, per_image, shift_y, shift_x,
    scale, mask,  # of the scores, and added to what the roll brought together; both times log2(e)
    qkv_b, qkv_y, qkv_x, group_b,  # pitches in elements
    HEAD: tl.constexpr, PAD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROLL_FIRST: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr,
    GROUPED: tl.constexpr, TABLE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block, head, part = program % BLOCKS, program // BLOCKS % heads, program // BLOCKS // heads
    k_at, v_at = (heads + head) * HEAD, (2 * heads + head) * HEAD
    key_N, query_M = tl.arange(0, KEYS), block * BLOCK_M + tl.arange(0, BLOCK_M)
    bias = load_bias(table_ptr, query_M[None, :], key_N[:, None], heads, head, WH, WW, TABLE)
    if COSINE:
        scale = tl.load(head_scale_ptr + head) * 1.4426950408889634
    for step in tl.range(0, tl.cdiv(windows - part, parts), num_stages=1):
        window = part + step * parts
        image = (window // per_image).to(tl.int64)
        qkv = qkv_ptr + image * qkv_b
        y_N, x_N, inside_N, label_N = locate(
            key_N, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
        )
        y_M, x_M, inside_M, label_M = locate(
            query_M, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
        )
        at_N = y_N * qkv_y + x_N * qkv_x
        at_M = y_M * qkv_y + x_M * qkv_x
        q = load_projected(qkv, bias_ptr, head * HEAD, at_M, inside_M, query_M < N, HEAD, PAD, PADDED)
        k = load_projected(qkv, bias_ptr, k_at, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
        id_N = load_ids(group_ptr, image * group_b, y_N * cols + x_N, inside_N, GROUPED)
        id_M = load_ids(group_ptr, image * group_b, y_M * cols + x_M, inside_M, GROUPED)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if COSINE:
            s = s * (inverse_norms(k)[0][:, None] * inverse_norms(q)[0][None, :])
        s = s * scale + bias
        s = restrict(
            s, label_M[None, :], label_N[:, None], id_M[None, :], id_N[:, None], key_N[:, None], mask,
            N, SHIFTED, GROUPED,
        )  # fmt: skip
        p = tl.exp2(s - tl.max(s, axis=0)[None, :])
        p = (p / tl.sum(p, axis=0)[None, :]).to(k.dtype)
        v = load_projected(qkv, bias_ptr, v_at, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
        out = tl.dot(tl.trans(p), v, input_precision="ieee")
        out_at = (y_M * cols + x_M) * heads * HEAD
        store_rows(out_ptr + (image * rows * cols * heads + head) * HEAD, out_at, inside_M, out, HEAD, PAD)


@triton.jit
def scores_and_gradients(
    qkv, bias_ptr, group_ptr, group_at, key_N, q, inverse_M, grad, bias, label_M, id_M, window, heads, head, rows,
    cols, across, per_image, shift_y, shift_x, scale, mask, qkv_y, qkv_x,
    HEAD: tl.constexpr, PAD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROLL_FIRST: tl.constexpr,
    SHIFTED: tl.constexpr, PADDED: tl.constexpr, GROUPED: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Of some keys and a block of queries: scores, gradients of the probabilities, the keys and their 1 / norm."""
    N: tl.constexpr = WH * WW
    y_N, x_N, inside_N, label_N = locate(
        key_N, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
    )
    at_N = y_N * qkv_y + x_N * qkv_x
    k = load_projected(qkv, bias_ptr, (heads + head) * HEAD, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
    id_N = load_ids(group_ptr, group_at, y_N * cols + x_N, inside_N, GROUPED)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    inverse_N = label_N
    if COSINE:
        inverse_N = inverse_norms(k)[0]
        s = s * (inverse_N[:, None] * inverse_M[None, :])
    s = s * scale + bias
    s = restrict(
        s, label_M[None, :], label_N[:, None], id_M[None, :], id_N[:, None], key_N[:, None], mask, N, SHIFTED, GROUPED
    )
    v = load_projected(qkv, bias_ptr, (2 * heads + head) * HEAD, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
    return s, tl.dot(v, tl.trans(grad), input_precision="ieee"), k, inverse_N


@triton.jit(do_not_specialize=STEADY)
def window_attention_bwd_kernel(
    qkv_ptr, table_ptr, bias_ptr, group_ptr, head_scale_ptr,  # as forward
    grad_ptr,  # gradient of the result, its shape and type; rows dense
    d_qkv_ptr,  # [B, H, W, 3, heads, HEAD], dense, type of qkv: q is written, and k and v if D_KV
    sums_ptr,  # [windows, heads, 2, N] fp32: log2 of the row sums, delta. Written unless D_KV
    d_scores_ptr,  # [parts, heads, N, N] fp32: sums of dS over windows by key and query. Written if TABLE
    d_bias_ptr,  # [parts, heads, 2, PAD] fp32: sums of dk and dv over padding. Written if D_KV and PADDED
    d_head_scale_ptr,  # [programs] fp32: sums of the gradient of a head's scale. Written if COSINE, which is not D_KV
    windows, parts, heads, rows, cols, across, per_image, shift_y, shift_x,
    factor, scale, mask,  # of the scores, and the same times log2(e), as mask is
    qkv_b, qkv_y, qkv_x, grad_b, grad_y, grad_x, group_b,
    HEAD: tl.constexpr, PAD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, ROLL_FIRST: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr,
    GROUPED: tl.constexpr, TABLE: tl.constexpr, COSINE: tl.constexpr,
    D_KV: tl.constexpr,  # the block holds every query
    SPLIT: tl.constexpr,  # KEYS are half of the keys: products over all of them at once would spill
    TURNED: tl.constexpr,  # dq is made as its transpose, which takes fewer registers for half types and narrow heads
):  # fmt: skip
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    block, head, part = program % BLOCKS, program // BLOCKS % heads, program // BLOCKS // heads
    key_N, query_M = tl.arange(0, KEYS), block * BLOCK_M + tl.arange(0, BLOCK_M)
    bias = load_bias(table_ptr, query_M[None, :], key_N[:, None], heads, head, WH, WW, TABLE)
    d_scores = tl.zeros([KEYS, BLOCK_M], tl.float32)
    if SPLIT:
        bias_2 = load_bias(table_ptr, query_M[None, :], key_N[:, None] + KEYS, heads, head, WH, WW, TABLE)
        d_scores_2 = tl.zeros([KEYS, BLOCK_M], tl.float32)
    if COSINE:
        factor = tl.load(head_scale_ptr + head)
        scale = factor * 1.4426950408889634
        d_head_scale = tl.zeros([BLOCK_M], tl.float32)
    pad_k = tl.zeros([PAD], tl.float32)
    pad_v = tl.zeros([PAD], tl.float32)
    for step in tl.range(0, tl.cdiv(windows - part, parts), num_stages=1):
        window = part + step * parts
        image = (window // per_image).to(tl.int64)
        qkv = qkv_ptr + image * qkv_b
        y_M, x_M, inside_M, label_M = locate(
            query_M, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
        )
        at_M = y_M * qkv_y + x_M * qkv_x
        q = load_projected(qkv, bias_ptr, head * HEAD, at_M, inside_M, query_M < N, HEAD, PAD, PADDED)
        # what padding computes is thrown away: its gradient is 0
        grad_at = y_M * grad_y + x_M * grad_x
        grad = load_rows(grad_ptr + image * grad_b + head * HEAD, grad_at, inside_M, HEAD, PAD)
        id_M = load_ids(group_ptr, image * group_b, y_M * cols + x_M, inside_M, GROUPED)
        inverse_M = label_M
        if COSINE:
            inverse_M, size_M = inverse_norms(q)
        s, d_p, k, inverse_N = scores_and_gradients(
            qkv, bias_ptr, group_ptr, image * group_b, key_N, q, inverse_M, grad, bias, label_M, id_M, window, heads,
            head, rows, cols, across, per_image, shift_y, shift_x, scale, mask, qkv_y, qkv_x, HEAD, PAD, WH, WW,
            ROLL_FIRST, SHIFTED, PADDED, GROUPED, COSINE,
        )  # fmt: skip
        top_M = tl.max(s, axis=0)
        if SPLIT:
            s_2, d_p_2, k_2, inverse_N_2 = scores_and_gradients(
                qkv, bias_ptr, group_ptr, image * group_b, key_N + KEYS, q, inverse_M, grad, bias_2, label_M, id_M,
                window, heads, head, rows, cols, across, per_image, shift_y, shift_x, scale, mask, qkv_y, qkv_x, HEAD,
                PAD, WH, WW, ROLL_FIRST, SHIFTED, PADDED, GROUPED, COSINE,
            )  # fmt: skip
            top_M = tl.maximum(top_M, tl.max(s_2, axis=0))
        p = tl.exp2(s - top_M[None, :])
        total_M = tl.sum(p, axis=0)
        if SPLIT:
            p_2 = tl.exp2(s_2 - top_M[None, :])
            total_M += tl.sum(p_2, axis=0)
            p_2 = p_2 / total_M[None, :]
        p = p / total_M[None, :]
        delta_M = tl.sum(p * d_p, axis=0)
        if SPLIT:
            delta_M += tl.sum(p_2 * d_p_2, axis=0)
        if COSINE:  # probabilities do not quite add up to 1, and what the gradient of the scale adds up cancels
            sum_M = tl.sum(p, axis=0)
            if SPLIT:
                sum_M += tl.sum(p_2, axis=0)
            delta_M = delta_M / sum_M
        d_qkv = d_qkv_ptr + image * rows * cols * heads * (3 * HEAD)
        d_at_M = (y_M * cols + x_M) * heads * (3 * HEAD)
        if D_KV:  # keys are the queries; before dS, or both would have to be held
            d_v = tl.dot(p.to(grad.dtype), grad, input_precision="ieee")
            store_rows(d_qkv + (2 * heads + head) * HEAD, d_at_M, inside_M, d_v, HEAD, PAD)
        d_s = p * (d_p - delta_M[None, :])
        if TABLE:
            d_scores += d_s
        if COSINE:
            d_s = d_s * inverse_N[:, None]
        d_s = d_s.to(k.dtype)
        if D_KV:
            d_k = tl.dot(d_s, q, input_precision="ieee") * factor
            store_rows(d_qkv + (heads + head) * HEAD, d_at_M, inside_M, d_k, HEAD, PAD)
            d_q = tl.dot(tl.trans(d_s), k, input_precision="ieee")
            store_rows(d_qkv + head * HEAD, d_at_M, inside_M, d_q * factor, HEAD, PAD)
            if PADDED:
                pad_M = (query_M < N) & ~inside_M
                pad_k += tl.sum(tl.where(pad_M[:, None], d_k, 0.0), axis=0)
                pad_v += tl.sum(tl.where(pad_M[:, None], d_v, 0.0), axis=0)
        else:
            if SPLIT:
                d_s_2 = p_2 * (d_p_2 - delta_M[None, :])
                if TABLE:
                    d_scores_2 += d_s_2
                if COSINE:
                    d_s_2 = d_s_2 * inverse_N_2[:, None]
                d_s_2 = d_s_2.to(k.dtype)
            if TURNED:
                d_q = tl.dot(tl.trans(k), d_s, input_precision="ieee")
                if SPLIT:
                    d_q = tl.dot(tl.trans(k_2), d_s_2, d_q, input_precision="ieee")
                d_q = tl.trans(d_q)
            else:
                d_q = tl.dot(tl.trans(d_s), k, input_precision="ieee")
                if SPLIT:
                    d_q = tl.dot(tl.trans(d_s_2), k_2, d_q, input_precision="ieee")
            if COSINE:
                d_q, along_M = through_norm(d_q, q, inverse_M, size_M)
                d_head_scale += along_M
            store_rows(d_qkv + head * HEAD, d_at_M, inside_M, d_q * factor, HEAD, PAD)
            sums = sums_ptr + (window.to(tl.int64) * heads + head) * 2 * N + query_M
            tl.store(sums, top_M + tl.log2(total_M), mask=query_M < N)
            tl.store(sums + N, delta_M, mask=query_M < N)
    if TABLE:
        at = (part * heads + head).to(tl.int64) * (N * N) + key_N[:, None] * N + query_M[None, :]
        tl.store(d_scores_ptr + at, d_scores, mask=(key_N < N)[:, None] & (query_M < N)[None, :])
        if SPLIT:
            mask_2 = (key_N + KEYS < N)[:, None] & (query_M < N)[None, :]
            tl.store(d_scores_ptr + at + KEYS * N, d_scores_2, mask=mask_2)
    if COSINE:
        tl.store(d_head_scale_ptr + program, tl.sum(d_head_scale, axis=0))
    if D_KV and PADDED:
        d = tl.arange(0, PAD)
        tl.store(d_bias_ptr + (part * heads + head) * 2 * PAD + d, pad_k)
        tl.store(d_bias_ptr + ((part * heads + head) * 2 + 1) * PAD + d, pad_v)


@triton.jit(do_not_specialize=STEADY)
def window_attention_dkv_kernel(
    qkv_ptr, table_ptr, bias_ptr, group_ptr, head_scale_ptr, grad_ptr,  # as above
    d_qkv_ptr,  # k and v are written
    sums_ptr,  # read
    d_bias_ptr,  # [windows, heads, blocks of keys, 2, PAD] fp32, written if PADDED
    windows, parts, heads, rows, cols, across, per_image, shift_y, shift_x,
    factor, scale, mask,
    qkv_b, qkv_y, qkv_x, grad_b, grad_y, grad_x, group_b,
    HEAD: tl.constexpr, PAD: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    KEYS: tl.constexpr,  # of one program
    BLOCK_M: tl.constexpr, ROLL_FIRST: tl.constexpr, SHIFTED: tl.constexpr, PADDED: tl.constexpr,
    GROUPED: tl.constexpr, TABLE: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (N + KEYS - 1) // KEYS
    program = tl.program_id(0)
    head, window = program // BLOCKS % heads, program // BLOCKS // heads
    k_at, v_at = (heads + head) * HEAD, (2 * heads + head) * HEAD
    image = (window // per_image).to(tl.int64)
    qkv = qkv_ptr + image * qkv_b
    key_N = program % BLOCKS * KEYS + tl.arange(0, KEYS)
    y_N, x_N, inside_N, label_N = locate(
        key_N, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
    )
    at_N = y_N * qkv_y + x_N * qkv_x
    k = load_projected(qkv, bias_ptr, k_at, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
    v = load_projected(qkv, bias_ptr, v_at, at_N, inside_N, key_N < N, HEAD, PAD, PADDED)
    id_N = load_ids(group_ptr, image * group_b, y_N * cols + x_N, inside_N, GROUPED)
    if COSINE:
        factor = tl.load(head_scale_ptr + head)
        scale = factor * 1.4426950408889634
        inverse_N, size_N = inverse_norms(k)
    d_k = tl.zeros([KEYS, PAD], tl.float32)
    d_v = tl.zeros([KEYS, PAD], tl.float32)
    for start in tl.range(0, N, BLOCK_M, num_stages=1):
        query_M = start + tl.arange(0, BLOCK_M)
        y_M, x_M, inside_M, label_M = locate(
            query_M, window, rows, cols, across, per_image, shift_y, shift_x, WH, WW, ROLL_FIRST
        )
        at_M = y_M * qkv_y + x_M * qkv_x
        q = load_projected(qkv, bias_ptr, head * HEAD, at_M, inside_M, query_M < N, HEAD, PAD, PADDED)
        grad_at = y_M * grad_y + x_M * grad_x
        grad = load_rows(grad_ptr + image * grad_b + head * HEAD, grad_at, inside_M, HEAD, PAD)
        id_M = load_ids(group_ptr, image * group_b, y_M * cols + x_M, inside_M, GROUPED)
        bias = load_bias(table_ptr, query_M[None, :], key_N[:, None], heads, head, WH, WW, TABLE)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if COSINE:
            inverse_M = inverse_norms(q)[0]
            s = s * (inverse_N[:, None] * inverse_M[None, :])
        s = s * scale + bias
        s = restrict(
            s, label_M[None, :], label_N[:, None], id_M[None, :], id_N[:, None], key_N[:, None], mask,
            N, SHIFTED, GROUPED,
        )  # fmt: skip
        sums = sums_ptr + (window.to(tl.int64) * heads + head) * 2 * N + query_M
        p = tl.exp2(s - tl.load(sums, mask=query_M < N, other=float("inf"))[None, :])
        d_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
        d_s = p * (d_p - tl.load(sums + N, mask=query_M < N, other=0.0)[None, :])
        if COSINE:
            d_s = d_s * inverse_M[None, :]
        d_v = tl.dot(p.to(grad.dtype), grad, d_v, input_precision="ieee")
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision="ieee")
    if COSINE:
        d_k, _ = through_norm(d_k, k, inverse_N, size_N)
    d_k *= factor
    d_qkv = d_qkv_ptr + image * rows * cols * heads * (3 * HEAD)
    d_at_N = (y_N * cols + x_N) * heads * (3 * HEAD)
    store_rows(d_qkv + k_at, d_at_N, inside_N, d_k, HEAD, PAD)
    store_rows(d_qkv + v_at, d_at_N, inside_N, d_v, HEAD, PAD)
    if PADDED:
        pad_N, d = (key_N < N) & ~inside_N, tl.arange(0, PAD)
        at = (window.to(tl.int64) * heads + head) * BLOCKS + program % BLOCKS
        tl.store(d_bias_ptr + at * 2 * PAD + d, tl.sum(tl.where(pad_N[:, None], d_k, 0.0), axis=0))
        tl.store(d_bias_ptr + (at * 2 + 1) * PAD + d, tl.sum(tl.where(pad_N[:, None], d_v, 0.0), axis=0))


@triton.jit(do_not_specialize=["parts", "heads"])
def window_attention_fold_kernel(
    d_scores_ptr,  # [parts, heads, N, N] fp32, by key and query
    d_table_ptr,  # [(2 WH - 1) * (2 WW - 1), heads] fp32, fully written
    parts, heads,
    WH: tl.constexpr, WW: tl.constexpr, KEYS: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program has BLOCK_O offsets of a head: adds up parts in their order, then the pairs of each offset."""
    N: tl.constexpr = WH * WW
    OFFSETS: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    head = tl.program_id(1)
    offset = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    key = tl.arange(0, KEYS)
    y = (key // WW)[None, :] + (offset // (2 * WW - 1) - (WH - 1))[:, None]
    x = (key % WW)[None, :] + (offset % (2 * WW - 1) - (WW - 1))[:, None]
    inside = (key < N)[None, :] & (y >= 0) & (y < WH) & (x >= 0) & (x < WW)
    at = key[None, :] * N + y * WW + x
    total = tl.zeros([BLOCK_O, KEYS], tl.float32)
    for part in range(parts):
        base = d_scores_ptr + (part * heads + head).to(tl.int64) * (N * N)
        total += tl.load(base + at, mask=inside, other=0.0)
    tl.store(d_table_ptr + offset * heads + head, tl.sum(total, axis=1), mask=offset < OFFSETS)


class Tile(NamedTuple):
    """How one launch cuts a window: rows of keys and of queries, warps."""

    keys: int
    block: int
    warps: int


def tile_shape(tokens: int, head: int) -> tuple[int, int]:
    """Rows of keys and columns of a head, as powers of 2."""
    return max(16, triton.next_power_of_2(tokens)), max(16, triton.next_power_of_2(head))


def forward_tile(tokens: int, head: int, size: int, rare: bool, cosine: bool) -> Tile:
    """For windows of `tokens` tokens, `head` values per head of `size` bytes; `rare` with padding, groups or
    cosines, which take registers. Chosen so that nothing spills.
    """
    keys, pad = tile_shape(tokens, head)
    if size == 4:
        return Tile(keys, 16 if keys <= 64 else 32, max(1, min(8, keys * pad // 512)))
    if keys > 64:
        return Tile(keys, 16 if keys == 256 and rare and not cosine else 32, 8)
    return Tile(keys, keys, 1 if keys == 16 else 8 if rare else 4)


def backward_tiles(tokens: int, head: int, size: int, rare: bool) -> list[Tile]:
    """One launch, or two: dq and the bias, then dk and dv."""
    keys, pad = tile_shape(tokens, head)
    if size == 4:
        first = Tile(min(keys, 128), 16, max(1, min(8, keys * pad // 512)))
        return [first, Tile(512 // pad, 16, 4) if keys == 256 else Tile(min(keys, 2048 // pad), 16, 8)]
    if keys <= 64 and pad <= 32 and not rare:
        return [Tile(keys, keys, 1 if keys == 16 else keys // 8)]
    first = Tile(min(keys, 128), 16 if keys > 128 else min(keys, 32), min(8, keys // 8))
    return [first, Tile(min(keys, 32 if pad == 64 else 64), 16 if rare and keys == 64 else 32, 4)]


def window_attention_fwd(
    qkv: Tensor, table: Tensor | None, qkv_bias: Tensor | None, group: Tensor | None, window: list[int],
    shift: list[int], heads: int, scale: float, pad: str, mask_value: float, head_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, H, W, 3C) -> (B, H, W, C); with `head_scale` (heads) float32 the cosine form."""
    qkv, head = _dense(qkv), qkv.shape[-1] // (3 * heads)
    out = qkv.new_empty(*qkv.shape[:-1], heads * head)
    tokens = window[0] * window[1]
    tile = forward_tile(
        tokens, head, qkv.element_size(), _is_rare(qkv, window, group, head_scale), head_scale is not None
    )
    sizes, blocks = _sizes(qkv, window, shift, heads, tile), triton.cdiv(tokens, tile.block)
    if out.numel():
        qkv_bias = _bias_of(qkv, qkv_bias, window)
        with torch.cuda.device_of(qkv):
            window_attention_fwd_kernel[(sizes[1] * heads * blocks,)](
                qkv, table, qkv_bias, group, head_scale, out, *sizes, scale * LOG2E, mask_value * LOG2E,
                *qkv.stride()[:3], _pitch(group),
                **_constants(table, qkv_bias, group, head_scale, window, shift, pad, head, tile),
            )  # fmt: skip
    return out


def window_attention_bwd(
    grad: Tensor, qkv: Tensor, table: Tensor | None, qkv_bias: Tensor | None, group: Tensor | None,
    window: list[int], shift: list[int], heads: int, scale: float, pad: str, mask_value: float,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, table, qkv_bias (through padding) and head_scale; all but the first float32, empty for None."""
    grad, qkv, head, given = _dense(grad), _dense(qkv), qkv.shape[-1] // (3 * heads), qkv_bias
    d_qkv, tokens = qkv.new_empty(qkv.shape), window[0] * window[1]
    d_table = qkv.new_zeros((0,) if table is None else table.shape, dtype=torch.float32)
    d_bias = qkv.new_zeros((0,) if given is None else given.shape, dtype=torch.float32)
    d_head_scale = qkv.new_zeros((0,) if head_scale is None else head_scale.shape, dtype=torch.float32)
    if not d_qkv.numel():
        return d_qkv, d_table, d_bias, d_head_scale
    tiles = backward_tiles(tokens, head, qkv.element_size(), _is_rare(qkv, window, group, head_scale))
    qkv_bias = _bias_of(qkv, qkv_bias, window)
    sizes, blocks = _sizes(qkv, window, shift, heads, tiles[0]), triton.cdiv(tokens, tiles[0].block)
    windows, parts = sizes[:2]
    numbers = (scale, scale * LOG2E, mask_value * LOG2E)
    pitches = (*qkv.stride()[:3], *grad.stride()[:3], _pitch(group))
    constants = [_constants(table, qkv_bias, group, head_scale, window, shift, pad, head, tile) for tile in tiles]
    fp32: Any = {"dtype": torch.float32}
    d_scores = None if table is None else qkv.new_empty((parts, heads, tokens, tokens), **fp32)
    sums = None if len(tiles) == 1 else qkv.new_empty((windows, heads, 2, tokens), **fp32)
    # what padding gets, by program of the launch that has dk and dv
    key_blocks = 1 if sums is None else triton.cdiv(tokens, tiles[1].keys)
    padding = None
    if constants[0]["PADDED"]:
        programs = parts if sums is None else windows
        padding = qkv.new_empty((programs, heads, key_blocks, 2, constants[0]["PAD"]), **fp32)
    of_scale = None if head_scale is None else qkv.new_empty((parts, heads, blocks), **fp32)
    with torch.cuda.device_of(qkv):
        window_attention_bwd_kernel[(parts * heads * blocks,)](
            qkv, table, qkv_bias, group, head_scale, grad, d_qkv, sums, d_scores, padding if sums is None else None,
            of_scale, *sizes, *numbers, *pitches, **_first(tokens, head, tiles, qkv.element_size()), **constants[0],
        )  # fmt: skip
        if sums is not None:
            window_attention_dkv_kernel[(windows * heads * key_blocks,)](
                qkv, table, qkv_bias, group, head_scale, grad, d_qkv, sums, padding, *sizes, *numbers, *pitches,
                **constants[1],
            )  # fmt: skip
        if d_scores is not None:
            block, keys = fold_block(tokens), tile_shape(tokens, head)[0]
            window_attention_fold_kernel[(triton.cdiv(d_table.shape[0], block), heads)](
                d_scores, d_table, parts, heads, WH=window[0], WW=window[1], KEYS=keys, BLOCK_O=block
            )
    if padding is not None and given is not None:
        d_bias.view(3, heads, head)[1:] = padding.sum((0, 2))[..., :head].transpose(0, 1)
    return d_qkv, d_table, d_bias, d_head_scale if of_scale is None else of_scale.sum((0, 2))


def fold_block(tokens: int) -> int:
    """Offsets of one program of the fold."""
    return min(32, 2048 // tile_shape(tokens, 16)[0])


def _dense(x: Tensor) -> Tensor:
    # inside an image rows are counted in 32 bits, which saves registers; pitches beyond that are copied together
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 > x.shape[2] * x.stride(2) else x.contiguous()


def _sizes(qkv: Tensor, window: list[int], shift: list[int], heads: int, tile: Tile) -> tuple[int, ...]:
    """What every kernel is told about the map, as STEADY names it."""
    (B, rows, cols, _), (WH, WW) = qkv.shape, window
    across, blocks = triton.cdiv(cols, WW), triton.cdiv(WH * WW, tile.block)
    per_image = triton.cdiv(rows, WH) * across
    parts = max(1, min(B * per_image, triton.cdiv(PROGRAMS, heads * blocks)))
    return B * per_image, parts, heads, rows, cols, across, per_image, *shift


def _bias_of(qkv: Tensor, qkv_bias: Tensor | None, window: list[int]) -> Tensor | None:
    """What padding holds, where there is padding."""
    if not (qkv.shape[1] % window[0] or qkv.shape[2] % window[1]):
        return None
    return qkv.new_zeros(qkv.shape[-1]) if qkv_bias is None else qkv_bias.contiguous()


def _is_rare(qkv: Tensor, window: list[int], group: Tensor | None, head_scale: Tensor | None) -> bool:
    return group is not None or head_scale is not None or qkv.shape[1] % window[0] > 0 or qkv.shape[2] % window[1] > 0


def _first(tokens: int, head: int, tiles: list[Tile], size: int) -> dict[str, bool]:
    """What only the first launch of a backward is told."""
    return {"D_KV": len(tiles) == 1, "SPLIT": tokens > tiles[0].keys, "TURNED": size == 2 and head <= 32}


def _pitch(group: Tensor | None) -> int:
    return 0 if group is None or len(group) == 1 else group.stride(0)


def _constants(
    table: Tensor | None, padding: Tensor | None, group: Tensor | None, head_scale: Tensor | None, window: list[int],
    shift: list[int], pad: str, head: int, tile: Tile,
) -> dict:  # fmt: skip
    return {
        "HEAD": head, "PAD": max(16, triton.next_power_of_2(head)), "WH": window[0], "WW": window[1],
        "KEYS": tile.keys, "BLOCK_M": tile.block, "ROLL_FIRST": pad == "roll_then_pad", "SHIFTED": any(shift),
        "PADDED": padding is not None, "GROUPED": group is not None, "TABLE": table is not None,
        "COSINE": head_scale is not None, "num_warps": tile.warps,
    }  # fmt: skip


def aot(kind: str, window: int, head: int, rare: bool = False, cosine: bool = False) -> dict[str, tuple]:
    """Ahead of time: the launches of one shape, shifted, with a table; `rare` has padding and groups."""
    size, tokens = (4 if kind == "fp32" else 2), window * window
    types = {"qkv_ptr": f"*{kind}", "table_ptr": "*fp32"} | ({"head_scale_ptr": "*fp32"} if cosine else {})
    types |= {"bias_ptr": f"*{kind}", "group_ptr": "*i32"} if rare else {}
    absent = dict.fromkeys({"bias_ptr", "group_ptr", "head_scale_ptr"} - set(types))
    types |= dict.fromkeys(STEADY, "i32") | dict.fromkeys(("scale", "mask"), "fp32")
    types |= dict.fromkeys(("qkv_b", "qkv_y", "qkv_x", "group_b"), "i32:16")
    shape: dict[str, Any] = {"ROLL_FIRST": False, "SHIFTED": True, "TABLE": True, "COSINE": cosine}
    shape |= {"PADDED": rare, "GROUPED": rare}
    shape |= {"HEAD": head, "PAD": tile_shape(tokens, head)[1], "WH": window, "WW": window} | absent
    back = types | dict.fromkeys(("grad_ptr", "d_qkv_ptr"), f"*{kind}") | {"factor": "fp32"}
    back |= dict.fromkeys(("grad_b", "grad_y", "grad_x"), "i32:16")
    forward = forward_tile(tokens, head, size, rare or cosine, cosine)
    first, *second = backward_tiles(tokens, head, size, rare or cosine)
    suffix = f"{kind}-{window}-{head}" + ("-padded-grouped" if rare else "")
    padding = {"d_bias_ptr": "*fp32"}
    found = {f"fwd-{suffix}": (window_attention_fwd_kernel, types | {"out_ptr": f"*{kind}"}, shape, forward)}
    none: dict[str, Any] = _first(tokens, head, [first, *second], size)
    of_first = back | {"d_scores_ptr": "*fp32"}
    of_first |= {"d_head_scale_ptr": "*fp32"} if cosine else {}
    of_first |= {"sums_ptr": "*fp32"} if second else padding if rare else {}
    none |= dict.fromkeys({"sums_ptr", "d_bias_ptr", "d_head_scale_ptr"} - set(of_first))
    found[f"{'dq' if second else 'bwd'}-{suffix}"] = (window_attention_bwd_kernel, of_first, shape | none, first)
    for tile in second:
        of_second = back | {"sums_ptr": "*fp32"} | (padding if rare else {})
        none = {} if rare else {"d_bias_ptr": None}
        found[f"dkv-{suffix}"] = (window_attention_dkv_kernel, of_second, shape | none, tile)
    return {
        name: (kernel, of_types, constants | {"KEYS": tile.keys, "BLOCK_M": tile.block}, tile.warps)
        for name, (kernel, of_types, constants, tile) in found.items()
    }


def _aot_fold(window: int) -> dict[str, tuple]:
    types = {"d_scores_ptr": "*fp32", "d_table_ptr": "*fp32", "parts": "i32", "heads": "i32"}
    tokens = window * window
    constants = {"WH": window, "WW": window, "KEYS": tile_shape(tokens, 16)[0], "BLOCK_O": fold_block(tokens)}
    return {f"fold-{window}": (window_attention_fold_kernel, types, constants, 4)}


# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    **aot("bf16", 7, 32), **aot("bf16", 7, 32, rare=True), **aot("bf16", 4, 48), **aot("bf16", 8, 24),
    **aot("bf16", 8, 64, rare=True), **aot("bf16", 12, 32), **aot("bf16", 14, 32, rare=True),
    **aot("fp16", 16, 32), **aot("fp32", 7, 32), **aot("fp32", 12, 16), **_aot_fold(7), **_aot_fold(16),
}  # fmt: skip
