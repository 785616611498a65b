"""The loss tail in Triton, for the kernels of pixel_loss and hog_loss: f(d), its derivative, and who writes what.

Work: none of its own; these functions are inlined into the kernels that call them.
fp32: everything.
"""

import triton
import triton.language as tl

KINDS = {"mse": 0, "l1": 1, "smooth_l1": 2}


@triton.jit
def penalty(diff, beta, KIND: tl.constexpr):
    """f(diff) and its derivative, element by element; NaN stays NaN."""
    size = tl.abs(diff)
    sign = tl.where(diff > 0, 1.0, tl.where(diff < 0, -1.0, diff))  # diff itself where it is 0 or NaN
    if KIND == 0:
        loss, step = diff * diff, 2.0 * diff
    elif KIND == 1:
        loss, step = size, sign
    else:
        loss = tl.where(size < beta, 0.5 * diff * diff / beta, size - 0.5 * beta)
        step = tl.where(size < beta, diff / beta, sign)
    return loss, step


@triton.jit
def rows_that_count(hidden_ptr, row_R, rows, R, L, COMPACT: tl.constexpr):
    """The tokens that rows row_R of all B * R predict, and which of them count."""
    inside_R = row_R < rows
    if COMPACT:
        l_R = tl.load(hidden_ptr + row_R, mask=inside_R, other=-1)
        counts_R = (l_R >= 0) & (l_R < L)  # the others are not read
    else:
        l_R = row_R % R
        counts_R = tl.load(hidden_ptr + row_R, mask=inside_R, other=0) != 0
    return l_R, counts_R


AOT: dict[str, tuple] = {}  # compiled inside the kernels that use it
