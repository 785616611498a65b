"""Tables of relative position bias for another window: a cubic spline over geometrically growing distances.

BEiT's published code has the rule, SimMIM (arXiv:2111.09886) and FastMIM (arXiv:2212.06593) use it: neighbours keep
their bias and the farthest offset of one window becomes the farthest of the other. With n and m the largest offsets
(window - 1) and q such that 1 + q + ... + q^(n-1) = m, the source's entries sit at 0, +-1, +-(1 + q), ... and the
spline through them is read at -m..m, on both axes. Linear, so the gradient reaches the small table.
h heads, s t sides 2 window - 1 of the source's and the wanted table
"""

from functools import lru_cache

import torch
from torch import Tensor

from mimfast._check import check_shape, fail

OP = "geometric_resize"


def geometric_resize(table: Tensor, window_from: int, window_to: int) -> Tensor:
    """The table for another window; the same tensor when the windows are equal.

    Args:
        table: ((2 window_from - 1)^2, h) floating point, row-major over (row offset, column offset).
        window_from: side of the window in tokens that it was made for.
        window_to: side wanted.
    Returns:
        ((2 window_to - 1)^2, h) in the dtype of `table`, computed in float32 at least.
    Raises:
        UserError: windows below 1, a table of another length.
    """
    for name, window in (("window_from", window_from), ("window_to", window_to)):
        if window < 1:
            fail(OP, name, window, "at least 1", "a window holds a token")
    s = 2 * window_from - 1
    check_shape(OP, "table", table, (s * s, None), f"window {window_from} has {s}^2 pairs of offsets")
    if window_from == window_to:
        return table
    wide = torch.promote_types(table.dtype, torch.float32)
    m_ts = matrix_on(window_from, window_to, table.device, wide)
    x_ssh = table.to(wide).unflatten(0, (s, s))
    return torch.einsum("as,bz,szh->abh", m_ts, m_ts, x_ssh).flatten(0, 1).to(table.dtype)


def matrix_on(window_from: int, window_to: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`resize_matrix` on a device, kept there: a copy from the host waits and breaks CUDA-graph capture."""
    return _kept(window_from, window_to, device, dtype)


# or a compiled graph would make it anew in every step; torch.compiler.assume_constant_result does this too, after an
# import of the compiler that takes seconds
matrix_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _kept(window_from: int, window_to: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it may be needed for a gradient later
        return resize_matrix(window_from, window_to).to(device=device, dtype=dtype)


def resize_matrix(window_from: int, window_to: int) -> Tensor:
    """(2 window_to - 1, 2 window_from - 1) float64: one axis of the resize; both make kron(m, m) of the flat table."""
    n, m = window_from - 1, window_to - 1
    distances = torch.tensor(_ratio(n, m), dtype=torch.float64) ** torch.arange(n, dtype=torch.float64)
    right = distances.cumsum(0)
    at = torch.cat([-right.flip(0), right.new_zeros(1), right])
    # outside the spline's range, where no q fits, the farthest offset stands for those beyond
    wanted = torch.arange(-m, m + 1, dtype=torch.float64).clamp(at[0], at[-1])
    return spline_matrix(at, wanted)


def _ratio(n: int, m: int) -> float:
    """q with 1 + q + ... + q^(n - 1) = m, by bisection from 0.5 up to what two offsets need; the nearest when none."""
    low, high = 0.5, max(2.0, float(m))
    for _ in range(100):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(n)) > m else (q, high)
    return (low + high) / 2


def spline_matrix(at: Tensor, wanted: Tensor) -> Tensor:
    """The matrix that takes values at some points to those of the spline through them at others.

    The spline is cubic with the not-a-knot ends of FITPACK, linear for two or three points, constant for one.

    Args:
        at: (S,) float64, ascending.
        wanted: (T,) float64, inside the range of `at`.
    Returns:
        (T, S) float64.
    """
    S, eye = len(at), torch.eye(len(at), dtype=torch.float64)
    if S == 1:
        return eye.expand(len(wanted), 1).clone()
    step = at.diff()
    i = (torch.searchsorted(at, wanted.contiguous(), right=True) - 1).clamp(0, S - 2)
    h = step[i][:, None]
    right = (wanted - at[i])[:, None] / h
    left = 1 - right
    linear = left * eye[i] + right * eye[i + 1]
    if S < 4:
        return linear
    # second derivatives M as a function of the values y: A M = D y
    A, D = torch.zeros_like(eye), torch.zeros_like(eye)
    for j in range(1, S - 1):
        before, after = step[j - 1], step[j]
        A[j, j - 1 : j + 2] = torch.stack([before, 2 * (before + after), after])
        D[j, j - 1 : j + 2] = 6 * torch.stack([1 / before, -1 / before - 1 / after, 1 / after])
    # the third derivative has no jump at the second point and the last but one
    for row, j in ((0, 1), (S - 1, S - 2)):
        before, after = step[j - 1], step[j]
        A[row, j - 1 : j + 2] = torch.stack([after, -before - after, before])
    curve = torch.linalg.solve(A, D)
    return linear + h**2 / 6 * ((left**3 - left) * curve[i] + (right**3 - right) * curve[i + 1])
