"""Where the windows of a map lie and what a call of window attention must look like; shared by both versions of it.

A map of H x W tokens is rolled by `shift` up and to the left and cut into windows, row by row. Where a side is not a
multiple of the window's, zero tokens fill it up at the bottom and on the right: before the roll ("pad_then_roll", what
detection and segmentation models do) or after it ("roll_then_pad", timm). arXiv:2103.14030, section 3.2.
w windows of n tokens per image; T = H * W tokens of an image
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast.ops._choice import why_not_on

PADS = ("pad_then_roll", "roll_then_pad")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
Side = int | tuple[int, int]
TOKENS, HEADS, WIDE_TILE = 256, (16, 64), {2: 8192, 4: 4096}  # what kernels/window_attention.py takes
GRID = 65535  # windows times heads of an image that torch's CUDA kernel takes
TOKENS_CUDA, CHUNK = 64, 8  # csrc/window_attention.cu: tokens of a window, values that move at once


class Layout(NamedTuple):
    """Index tensors of one map."""

    token_wn: Tensor  # number of the token at each place of each window; T where there is padding
    label_wn: Tensor  # region of the rolled map; tokens of different regions were not neighbours before the roll
    place_T: Tensor  # where each token lies in token_wn, flattened


def pair(side: Side) -> tuple[int, int]:
    """(rows, columns) of a window or shift given as one number or two."""
    rows, cols = (side, side) if isinstance(side, int) else side
    return int(rows), int(cols)


def layout(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], pad: str, device) -> Layout:
    (row_p, row_label, row_place), (col_p, col_label, col_place) = (
        _axis(*side, pad, device) for side in zip(size, window, shift)
    )
    tokens = size[0] * size[1]
    inside = (row_p >= 0)[:, None] & (col_p >= 0)
    token_HW = torch.where(inside, row_p[:, None] * size[1] + col_p, tokens)
    wide = col_p.shape[0] // window[1]  # windows side by side
    window_HW = row_place[:, None] // window[0] * wide + col_place // window[1]
    within_HW = row_place[:, None] % window[0] * window[1] + col_place % window[1]
    place_T = (window_HW * (window[0] * window[1]) + within_HW).flatten()
    return Layout(_cut(token_HW, window), _cut(row_label[:, None] * 3 + col_label, window), place_T)


def _axis(size: int, window: int, shift: int, pad: str, device) -> tuple[Tensor, Tensor, Tensor]:
    """Of one side: the source of each rolled place (-1 padding), its region, and the rolled place of each source."""
    whole = -(-size // window) * window
    ring = whole if pad == "pad_then_roll" else size  # what is rolled
    i = torch.arange(whole, device=device)
    source = torch.where(i < ring, (i + shift) % ring, -1)
    source = torch.where(source < size, source, -1)
    label = (i >= whole - window).long() + (i >= whole - shift)
    return source, label, (torch.arange(size, device=device) - shift) % ring


def _cut(map_HW: Tensor, window: tuple[int, int]) -> Tensor:
    """(H, W) -> (w, n)."""
    tiles = map_HW.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


def pair_index(window: tuple[int, int], device) -> Tensor:
    """(n, n): which row of the table stands for the offset from a key to a query."""
    (rows, cols), n = window, torch.arange(window[0] * window[1], device=device)
    row_offset = n[:, None] // cols - n // cols + rows - 1
    return row_offset * (2 * cols - 1) + n[:, None] % cols - n % cols + cols - 1


def check_call(
    op: str, qkv: Tensor, window: tuple[int, int], shift: tuple[int, int], heads: int, pad: str | None,
    qkv_bias: Tensor | None, group: Tensor | None, mask_value: float,
) -> None:  # fmt: skip
    """Everything but the table, which has other names in other ops."""
    check_dtype(op, "qkv", qkv, FLOATS, "scores are products of real numbers")
    check_shape(op, "qkv", qkv, (None,) * 4, "it is (batch, rows, columns, 3 * width)")
    B, H, W, E = qkv.shape
    if heads < 1 or E % (3 * heads) or E == 0:
        fail(op, "heads", heads, f"a divisor of {E} / 3", "q, k and v are split evenly among the heads")
    if min(window) < 1:
        fail(op, "window", _by(window), "1 or more tokens a side", "it holds the tokens that see each other")
    if any(not 0 <= s < w for s, w in zip(shift, window)):
        reason = f"the roll moves a window of {_by(window)} by less than its side"
        fail(op, "shift", _by(shift), f"0 to {window[0] - 1} and 0 to {window[1] - 1}", reason)
    if pad is not None and pad not in PADS:
        fail(op, "pad", repr(pad), f"None or {' or '.join(map(repr, PADS))}", "no other order is known")
    if pad is None and (H % window[0] or W % window[1]):
        reason = f"the map has {H} x {W} tokens and no window may be cut"
        fail(op, "window", _by(window), f"a divisor of the map, or pad={PADS[0]!r} or {PADS[1]!r}", reason)
    if not mask_value <= 0:
        fail(op, "mask_value", mask_value, "0 or less", "it is added to the scores of tokens the roll brought together")
    if qkv_bias is not None:
        check_dtype(op, "qkv_bias", qkv_bias, FLOATS, "it stands for the q, k and v of padding")
        check_shape(op, "qkv_bias", qkv_bias, (E,), f"it is the bias of the projection to {E} values")
        check_same_device(op, qkv=qkv, qkv_bias=qkv_bias)
    if group is not None:
        check_dtype(op, "group", group, IDS, "it holds the id of each token's group")
        shape = (H, W) if group.ndim == 2 else (B, H, W)
        reason = f"it is one id for each of the {H} x {W} tokens, for the whole batch or for each image"
        check_shape(op, "group", group, shape, reason)
        check_same_device(op, qkv=qkv, group=group)


def check_table(op: str, name: str, table: Tensor, qkv: Tensor, window: tuple[int, int], heads: int) -> None:
    """The bias of each offset and head."""
    check_dtype(op, name, table, FLOATS, "it is added to the scores")
    offsets = 2 * window[0] - 1, 2 * window[1] - 1
    reason = (
        f"tokens of a {_by(window)} window are {_by(offsets)} offsets apart, with one bias for each of {heads} heads"
    )
    check_shape(op, name, table, (offsets[0] * offsets[1], heads), reason)
    check_same_device(op, qkv=qkv, **{name: table})


def check_ids(op: str, group: Tensor) -> None:
    """Raise unless every group id is in range. Waits for the device."""
    low, high = (int(x) for x in group.to(torch.int64).aminmax()) if group.numel() else (0, 0)
    if low < 0 or high >= 2**31:
        fail(op, "group", f"id {low if low < 0 else high}", f"0 to {2**31 - 1}", "ids are compared as 32-bit numbers")


def ids_of(group: Tensor) -> Tensor:
    """(B or 1, H, W) int32, dense: what the kernels read."""
    return group.reshape(-1, *group.shape[-2:]).to(torch.int32).contiguous()


def why_not(qkv: Tensor, window: tuple[int, int], heads: int, impl: str) -> str | None:
    """Why `impl` cannot take this call of either version; None when it can."""
    if impl == "sdpa":
        wide = -(-qkv.shape[1] // window[0]) * -(-qkv.shape[2] // window[1]) * heads
        if qkv.is_cuda and wide > GRID:
            return f"torch's kernel takes up to {GRID} windows times heads of an image, and these are {wide}"
        return why_not_on(impl, qkv.device.type)
    if qkv.dtype == torch.float64:
        return "the kernel computes in float32 and was given float64"
    if impl == "triton":
        (_, H, W, E), n, d = qkv.shape, window[0] * window[1], qkv.shape[-1] // (3 * heads)
        if not HEADS[0] <= d <= HEADS[1]:
            return f"the kernel takes {HEADS[0]} to {HEADS[1]} values per head, and {heads * d} / {heads} heads is {d}"
        if n > TOKENS:
            return f"the kernel keeps a window on chip, which suits up to {TOKENS} tokens, and this one has {n}"
        tile = 1 << max(4, (n - 1).bit_length()) + (d - 1).bit_length()  # padded to powers of 2
        most = WIDE_TILE[qkv.element_size()]
        if tile > most:
            kind = str(qkv.dtype).removeprefix("torch.")
            return f"{n} tokens x {d} values pad to {tile}, and {kind} keys beyond {most} do not fit on chip"
        if H * W * E >= 2**31:
            return f"the kernel counts the values of an image in 32 bits, and {H} x {W} x {E} do not fit"
    if impl == "cuda":
        reason = _why_not_cuda(qkv, window, heads)
        if reason is not None:
            return reason
    return why_not_on(impl, qkv.device.type)


def _why_not_cuda(qkv: Tensor, window: tuple[int, int], heads: int) -> str | None:
    (_, H, W, E), n = qkv.shape, window[0] * window[1]
    d = E // (3 * heads)
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return "the kernel multiplies bfloat16 and float16 on tensor cores and was given float32"
    if n > TOKENS_CUDA:
        return f"the kernel keeps scores in registers, which suits up to {TOKENS_CUDA} tokens, and this window has {n}"
    if not HEADS[0] <= d <= HEADS[1] or d % CHUNK:
        wanted = f"{HEADS[0]} to {HEADS[1]} values per head, in whole chunks of {CHUNK}"
        return f"the kernel takes {wanted}, and {heads * d} / {heads} heads is {d}"
    if H * W >= 2**31:
        return f"the kernel counts the tokens of an image in 31 bits, and {H} x {W} do not fit"
    return None


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]}"
