"""Window attention by torch's scaled_dot_product_attention, over windows that are gathered out of the map.

Windows and heads of an image are one dimension there: the mask then needs no copy for each image, and torch's CUDA
kernel, which launches at most 65535 of a dimension, meets neither batch times windows nor a fifth dimension. Each way
between map and windows is one gather, and so is its gradient.

With a table that learns torch takes its memory-efficient kernel on a GPU; else cuDNN's may go first. The former may
split keys beyond one tile of 64 or 128 among blocks that add up the gradient of q as they come: two runs are equal to
the bit for windows of up to 64 tokens, and for larger ones under torch.use_deterministic_algorithms(True). It holds a
gradient for every score. On a CPU torch's composite of products and a softmax runs where the table learns, and two runs
are equal.
B images, T = H * W tokens, E = 3C packed as [3, heads, d], h heads; w windows of n tokens
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast.ops._windows import Layout, Side, ids_of, layout, pair


def attend(
    qkv: Tensor, table: Tensor | None, window: Side, shift: Side, heads: int, *, scale: float | None = None,
    pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None, mask_value: float = -100.0,
) -> Tensor:  # fmt: skip
    """The arguments and the result of `window_attention`.

    torch wants bias and mask in the dtype of qkv, and hands back the gradient of each score in it. In half types these
    are rounded so; the sums over images, windows and pairs are float32.
    """
    (B, H, W, E), (window, shift) = qkv.shape, (pair(window), pair(shift))
    places = layout((H, W), window, shift, pad or "pad_then_roll", qkv.device)
    windows, n = places.token_wn.shape
    d, padding = E // (3 * heads), windows * n - H * W
    there, back = _rows_of_qkv(places, heads)
    rows_BRd = _Cut.apply(qkv.reshape(B, H * W, E), qkv_bias, there, back, (windows, heads, n), padding > 0)
    q, k, v = rows_BRd.view(B, 3, windows * heads, n, d).unbind(1)
    mask = _mask(table, places, window, shift, heads, group, mask_value, qkv)
    out_Bwhnd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out_BRd = out_Bwhnd.transpose(1, 2).flatten(1, 2)  # no copy: torch's kernels write (B, n, w * h, d)
    rows_BThd = _Merge.apply(out_BRd, *_rows_of_out(places, heads), heads if padding else 0)
    return rows_BThd.view(B, H, W, E // 3)


def _rows_of_qkv(places: Layout, heads: int) -> tuple[Tensor, Tensor]:
    """Rows are d values. Which one of the map, [T + 1, 3, h], is at each place of [3, w, h, n], and the way back."""
    (token_wn, _, place_T), (windows, n) = places, places.token_wn.shape
    slot_31h1 = torch.arange(3 * heads, device=place_T.device).view(3, 1, heads, 1)
    there = token_wn[:, None] * (3 * heads) + slot_31h1
    # of the token at place p of window i: ((part * w + i) * h + head) * n + p
    part_31, head_h = slot_31h1[:, 0, :1, 0] // heads * windows, slot_31h1[0, 0, :, 0]
    back = ((part_31 + place_T[:, None, None] // n) * heads + head_h) * n + place_T[:, None, None] % n
    return there.flatten(), back.flatten()


def _rows_of_out(places: Layout, heads: int) -> tuple[Tensor, Tensor]:
    """Which row of [n, w, h] is at each place of the map, [T, h], and which of [T + 1, h] at each of those."""
    (token_wn, _, place_T), (windows, n) = places, places.token_wn.shape
    head_h = torch.arange(heads, device=place_T.device)
    there = ((place_T % n * windows + place_T // n) * heads)[:, None] + head_h
    back = (token_wn.t() * heads)[..., None] + head_h
    return there.flatten(), back.flatten()


def _mask(
    table: Tensor | None, places: Layout, window: tuple[int, int], shift: tuple[int, int], heads: int,
    group: Tensor | None, mask_value: float, qkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """(B, w * h, n, n) to be added to the scores; None for zeros."""
    token_wn, label_wn, _ = places
    windows, n = token_wn.shape
    score_Bwhnn = qkv.new_zeros(1, 1, 1, 1, dtype=torch.promote_types(qkv.dtype, torch.float32))
    if table is not None:
        score_Bwhnn = _Spread.apply(table.to(score_Bwhnn.dtype), window)
    if any(shift):
        apart_w1nn = (label_wn[:, :, None] != label_wn[:, None, :])[:, None]
        score_Bwhnn = torch.where(apart_w1nn, score_Bwhnn + mask_value, score_Bwhnn)
    if group is not None:  # padding belongs to every group
        id_BT = ids_of(group).flatten(1)
        id_Bwn = F.pad(id_BT, (0, 1), value=-1)[:, token_wn]
        owned_Bwn, apart_Bwnn = id_Bwn >= 0, id_Bwn[..., :, None] != id_Bwn[..., None, :]
        apart_Bwnn = apart_Bwnn & owned_Bwn[..., :, None] & owned_Bwn[..., None, :]
        score_Bwhnn = score_Bwhnn.masked_fill(apart_Bwnn[:, :, None], float("-inf"))
    if table is None and group is None and not any(shift):
        return None
    images = 1 if group is None else id_Bwn.shape[0]
    score_Brnn = score_Bwhnn.expand(images, windows, heads, n, n).flatten(1, 2)
    return score_Brnn.to(qkv.dtype) if images == len(qkv) else _Share.apply(score_Brnn, len(qkv), qkv.dtype)


class _Share(torch.autograd.Function):
    """One mask for all images in another dtype; the gradient is summed over them as the mask was, not in that dtype."""

    @staticmethod
    def forward(ctx, mask_1rnn, images, dtype):
        ctx.wide, n = mask_1rnn.dtype, mask_1rnn.shape[-1]
        # rows of whole 32 bytes: torch's kernel would lengthen others, for each image
        rows = F.pad(mask_1rnn.to(dtype), (0, -n % 16))[..., :n]
        return rows.expand(images, -1, -1, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.sum(0, keepdim=True, dtype=ctx.wide), None, None


class _Spread(torch.autograd.Function):
    """A table of offsets to the bias of every pair, (h, n, n); the gradient sums pairs in a fixed order."""

    @staticmethod
    def forward(ctx, table, window):
        (rows, cols), heads = window, table.shape[1]
        ctx.window = window
        offset_OOh = table.view(2 * rows - 1, 2 * cols - 1, heads)
        # at (first, i) of the unfolded: offset first + i, which is that of the key rows - 1 - i from the query `first`
        pair_hqqkk = offset_OOh.unfold(0, rows, 1).unfold(1, cols, 1).flip(-2, -1).permute(2, 0, 1, 3, 4)
        return pair_hqqkk.reshape(heads, rows * cols, rows * cols)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hnn):
        (rows, cols), heads = ctx.window, grad_hnn.shape[0]
        pair_hqkqk = grad_hnn.reshape(heads, rows, cols, rows, cols).transpose(2, 3)
        by_column_hOqk = _fold(pair_hqkqk).movedim(-1, 1)
        return _fold(by_column_hOqk).mT.flatten(1).t(), None


class _Cut(torch.autograd.Function):
    """Map to windows. Padding is the token `bias_E`, or 0."""

    @staticmethod
    def forward(ctx, tokens_BTE, bias_E, there, back, sizes, padded):
        ctx.save_for_backward(there, back)
        ctx.sizes, ctx.padded, ctx.bias = sizes, padded, None if bias_E is None else bias_E.dtype
        B, T, E = ctx.shape = tokens_BTE.shape
        if padded:
            token_E = tokens_BTE.new_zeros(E) if bias_E is None else bias_E.to(tokens_BTE.dtype)
            tokens_BTE = torch.cat([tokens_BTE, token_E.expand(B, 1, E)], 1)
        slots = 3 * sizes[1]
        return tokens_BTE.reshape(B, (T + padded) * slots, E // slots).index_select(1, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BRd):
        (there, back), (windows, heads, n), d_bias = ctx.saved_tensors, ctx.sizes, None
        d_tokens = grad_BRd.index_select(1, back).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad_BRd.dtype, torch.float32)
            if ctx.padded:
                padding_R1 = (there >= back.shape[0])[:, None]
                d_rows = torch.where(padding_R1, grad_BRd, 0).sum(0, dtype=wide)
                d_bias = d_rows.view(3, windows, heads, n, -1).sum((1, 3)).flatten().to(ctx.bias)
            else:
                d_bias = grad_BRd.new_zeros(ctx.shape[-1], dtype=ctx.bias)
        return d_tokens, d_bias, None, None, None, None


class _Merge(torch.autograd.Function):
    """Windows to map. `filler` rows of 0 stand for the gradient of what padding asked for."""

    @staticmethod
    def forward(ctx, out_BRd, there, back, filler):
        ctx.save_for_backward(back)
        ctx.filler = filler
        return out_BRd.index_select(1, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BRd):
        (back,) = ctx.saved_tensors
        if ctx.filler:
            grad_BRd = F.pad(grad_BRd, (0, 0, 0, ctx.filler))
        return grad_BRd.index_select(1, back), None, None, None


def _fold(x_qk: Tensor) -> Tensor:
    """(..., side, side) queries and keys of one axis to (..., 2 side - 1), the sums over pairs of the same offset."""
    side = x_qk.shape[-1]
    # the keys backwards, in rows of 2 side values: read in rows of one value less, an offset is a column
    wide = F.pad(x_qk.flip(-1), (0, side)).flatten(-2)
    return wide[..., : side * (2 * side - 1)].unflatten(-1, (side, 2 * side - 1)).sum(-2)
