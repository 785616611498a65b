"""Parts of the window attention kernels: where the tokens of a window are, and what their scores become.

Not an op: kernels/window_attention.py has the kernels made of these, for both versions of Swin's attention.
"""

import triton
import triton.language as tl


@triton.jit
def locate(
    i, window, rows, cols, across, per_image, shift_y, shift_x,
    WH: tl.constexpr, WW: tl.constexpr, ROLL_FIRST: tl.constexpr,
):  # fmt: skip
    """Of tokens i of a window: row and column in the image, whether they exist, and their region of the rolled map."""
    down = per_image // across
    r = window % per_image // across * WH + i // WW
    c = window % per_image % across * WW + i % WW
    whole_y, whole_x = down * WH, across * WW
    label = 3 * ((r >= whole_y - WH).to(tl.int32) + (r >= whole_y - shift_y).to(tl.int32))
    label += (c >= whole_x - WW).to(tl.int32) + (c >= whole_x - shift_x).to(tl.int32)
    ring_y, ring_x = whole_y, whole_x
    inside = i < WH * WW
    if ROLL_FIRST:
        inside = inside & (r < rows) & (c < cols)
        ring_y, ring_x = rows, cols
    y, x = r + shift_y, c + shift_x
    y = tl.where(y >= ring_y, y - ring_y, y)
    x = tl.where(x >= ring_x, x - ring_x, x)
    return y, x, inside & (y < rows) & (x < cols), tl.where(i < WH * WW, label, -1)


@triton.jit
def load_rows(ptr, at_R, inside_R, HEAD: tl.constexpr, PAD: tl.constexpr):
    """[rows, PAD]; 0 for padding and outside the head."""
    d = tl.arange(0, PAD)
    inside = inside_R[:, None]
    if HEAD != PAD:
        inside = inside & (d < HEAD)[None, :]
    return tl.load(ptr + at_R[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_projected(
    ptr, bias_ptr, column, at_R, inside_R, window_R, HEAD: tl.constexpr, PAD: tl.constexpr, PADDED: tl.constexpr
):
    """Rows of q, k or v from a column of qkv on; the padding of a window has the bias of the projection."""
    x = load_rows(ptr + column, at_R, inside_R, HEAD, PAD)
    if PADDED:
        d = tl.arange(0, PAD)
        bias = tl.load(bias_ptr + column + d, mask=d < HEAD, other=0.0).to(x.dtype)
        x = tl.where((window_R & ~inside_R)[:, None], bias[None, :], x)
    return x


@triton.jit
def store_rows(ptr, at_R, inside_R, values, HEAD: tl.constexpr, PAD: tl.constexpr):
    """The counterpart of load_rows."""
    d = tl.arange(0, PAD)
    inside = inside_R[:, None]
    if HEAD != PAD:
        inside = inside & (d < HEAD)[None, :]
    tl.store(ptr + at_R[:, None] + d[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_ids(group_ptr, image_at, at_R, inside_R, GROUPED: tl.constexpr):
    """Group of each token, -1 for padding; without groups anything."""
    if GROUPED:
        return tl.load(group_ptr + image_at + at_R, mask=inside_R, other=-1)
    else:
        return at_R


@triton.jit
def load_bias(table_ptr, query, key, heads, head, WH: tl.constexpr, WW: tl.constexpr, TABLE: tl.constexpr):
    """The bias of queries and keys, given as tensors that broadcast against each other; times log2(e)."""
    n: tl.constexpr = WH * WW
    row = (query // WW - key // WW + WH - 1) * (2 * WW - 1) + query % WW - key % WW + WW - 1
    if TABLE:
        bias = tl.load(table_ptr + row * heads + head, mask=(query < n) & (key < n), other=0.0)
        return bias.to(tl.float32) * 1.4426950408889634
    else:
        return row.to(tl.float32) * 0.0


@triton.jit
def restrict(
    s, query_label, key_label, query_id, key_id, key, mask, N: tl.constexpr, SHIFTED: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Scores with the mask of the roll, -inf between groups and for keys outside the window; tensors broadcast."""
    if SHIFTED:  # a row outside the window is kept from nobody, or it would hold NaN under an infinite mask
        s = tl.where((query_label != key_label) & (query_label >= 0), s + mask, s)
    if GROUPED:
        s = tl.where((query_id != key_id) & (query_id >= 0) & (key_id >= 0), float("-inf"), s)
    return tl.where(key < N, s, float("-inf"))


@triton.jit
def inverse_norms(x):
    """1 / |row|, with norms of at least 1e-12; and the same as the gradient wants it, 0 for a row without a norm.

    In float16 a row of zeros, as the key of padding is, has 0: 1e12 would be inf there, and inf times the row NaN.
    """
    wide = x.to(tl.float32)
    square_R = tl.sum(wide * wide, axis=1)
    inverse_R = 1.0 / tl.maximum(tl.sqrt_rn(square_R), 1e-12)
    if x.dtype == tl.float16:
        inverse_R = tl.where(square_R > 0.0, inverse_R, 0.0)
    return inverse_R, tl.where(inverse_R < 1e12, inverse_R, 0.0)


@triton.jit
def through_norm(d, x, inverse_R, size_R):
    """From the gradient of rows over their norms to that of the rows; and the products of rows and gradients."""
    unit = x.to(tl.float32) * inverse_R[:, None]
    along_R = tl.sum(unit * d, axis=1)
    return (d - unit * along_R[:, None]) * size_R[:, None], along_R


AOT: dict = {}  # nothing of its own
