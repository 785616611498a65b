"""Attention inside shifted windows, in plain torch. Swin, arXiv:2103.14030, section 3.2.

B batch, H W sides of the map, C width, N heads, d = C / N, w window side, n = w w tokens of a window, V windows
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mimfast._check import fail

MASKED = -100.0  # what the published models add to a pair of tokens that the roll brought together


def window_of(op: str, size: tuple[int, int], window: int) -> tuple[int, int]:
    """Window and shift (of every second block) for a map: a map not larger than its window is one, without a shift.

    Raises:
        UserError: windows do not tile the map.
    """
    shift = window // 2
    if min(size) <= window:
        window, shift = min(size), 0
    if window < 1 or size[0] % window or size[1] % window:
        because = f"windows tile the map of {size[0]}x{size[1]} tokens without a rest"
        fail(op, "window", window, "a divisor of both sides", because)
    return window, shift


def relative_index(window: int, device: torch.device) -> Tensor:
    """(n, n) int64: row of the bias table for (query, key), (dh + w - 1) (2 w - 1) + dw + w - 1."""
    at = torch.arange(window, device=device)
    apart_ww = at[:, None] - at + window - 1
    rows_wwww = apart_ww[:, None, :, None] * (2 * window - 1) + apart_ww[None, :, None, :]
    return rows_wwww.reshape(window * window, window * window)


def shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(V, n, n) float32: MASKED for pairs that the roll by `shift` brought together from opposite sides, else 0."""
    label_V = []
    for side in size:
        at = torch.arange(side, device=device)
        label_V.append((at >= side - window).int() + (at >= side - shift).int())
    label_HW = label_V[0][:, None] * 3 + label_V[1]
    label_Vn = label_HW.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(label_Vn[:, :, None] == label_Vn[:, None, :], 0.0, MASKED)


def window_attend(
    qkv: Tensor,
    bias: Tensor,
    window: int,
    shift: int,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias + mask) v inside each window.

    Args:
        qkv: (B, H, W, 3 C), channels ordered q, k, v, then head, then d.
        bias: (N, n, n) floating point.
        window: side w, a divisor of H and W.
        shift: the windows are those of the map rolled up and left by so much.
        heads: N.
        mask: (V, n, n) added to the scores of each window of the rolled map, or None.
        scale: None is 1 / sqrt(d).
    Returns:
        (B, H, W, C) in the place of its queries.
    """
    B, H, W, C3 = qkv.shape
    rows, columns, w, d = H // window, W // window, window, C3 // 3 // heads
    if shift:
        qkv = qkv.roll((-shift, -shift), (1, 2))
    qkv = qkv.view(B, rows, w, columns, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    # four dimensions: with five, torch leaves its fused kernels; windows with masks of their own go with the heads
    if mask is None:
        qkv, bias = qkv.reshape(3, B * rows * columns, heads, w * w, d), bias[None]
    else:
        qkv = qkv.reshape(3, B, rows * columns * heads, w * w, d)
        bias = (bias + mask[:, None]).flatten(0, 1)[None]
    q, k, v = qkv.unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=scale)
    out = out.view(B, rows, columns, heads, w, w, d).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C3 // 3)
    return out.roll((shift, shift), (1, 2)) if shift else out
