"""Shifted-window attention with a learned bias per offset, from packed q, k, v to merged heads, both in image order.

Swin Transformer, arXiv:2103.14030, section 3.2. For each window of the rolled map and each head, over its n tokens:
out = softmax(scale * q k^T + table[offset of q from k] + mask) v, where mask is `mask_value` for pairs that only the
roll brought together, else 0. Roll, cut, gather of the bias, mask and the way back are index arithmetic here.
B images, H W map in tokens, C width, E = 3C packed as [3, heads, d], h heads; w windows of n tokens, T = H * W
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast import _native
from mimfast.ops._choice import Impl, resolve
from mimfast.ops._windows import (
    Side,
    check_call,
    check_ids,
    check_table,
    ids_of,
    layout,
    pair,
    pair_index,
    why_not,
)
from mimfast.ops._windows_native import run_cpu, run_cuda
from mimfast.ops._windows_sdpa import attend

IMPLS = ("cuda", "triton", "cpu", "sdpa", "ref")


def window_attention_ref(
    qkv: Tensor, table: Tensor | None, window: Side, shift: Side, heads: int, *, scale: float | None = None,
    pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None, mask_value: float = -100.0,
) -> Tensor:  # fmt: skip
    wide, (B, H, W, E), window = torch.promote_types(qkv.dtype, torch.float32), qkv.shape, pair(window)
    token_wn, label_wn, place_T = layout((H, W), window, pair(shift), pad or "pad_then_roll", qkv.device)
    padding_E = torch.zeros(E, device=qkv.device) if qkv_bias is None else qkv_bias  # 0 goes into the projection
    tokens_BTE = torch.cat([qkv.flatten(1, 2).to(wide), padding_E.to(wide).expand(B, 1, E)], 1)
    q, k, v = tokens_BTE[:, token_wn].unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    score_Bwhnn = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if table is not None:
        score_Bwhnn = score_Bwhnn + table.to(wide)[pair_index(window, qkv.device)].permute(2, 0, 1)
    apart_wnn = label_wn[:, :, None] != label_wn[:, None, :]
    score_Bwhnn = torch.where(apart_wnn[:, None], score_Bwhnn + mask_value, score_Bwhnn)
    if group is not None:  # padding belongs to every group
        id_BT = ids_of(group).flatten(1)
        id_Bwn = torch.cat([id_BT, torch.full_like(id_BT[:, :1], -1)], 1)[:, token_wn]
        owned_Bwn, apart_Bwnn = id_Bwn >= 0, id_Bwn[..., :, None] != id_Bwn[..., None, :]
        apart_Bwnn = apart_Bwnn & owned_Bwn[..., :, None] & owned_Bwn[..., None, :]
        score_Bwhnn = score_Bwhnn.masked_fill(apart_Bwnn[:, :, None], float("-inf"))
    out_BwnC = (score_Bwhnn.softmax(-1) @ v).transpose(2, 3).flatten(3)
    return out_BwnC.flatten(1, 2)[:, place_T].unflatten(1, (H, W)).to(qkv.dtype)


def window_attention(
    qkv: Tensor, table: Tensor | None, window: Side, shift: Side, heads: int, *, scale: float | None = None,
    pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None, mask_value: float = -100.0,
    checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attend inside the windows of a map; reads a fused qkv projection in image order, writes in image order.

    Args:
        qkv: (B, H, W, 3C). float32, bfloat16 or float16 (float64 runs `sdpa` and `ref`). The last dimension is
            [q | k | v], each [heads, d]. Any strides; a last dimension that is not dense is copied once.
        table: ((2 wh - 1) * (2 ww - 1), heads), bias of each offset, row (dy + wh - 1) * (2 ww - 1) + dx + ww - 1 for
            a query dy below and dx right of its key; or None. Any floating dtype.
        window: sides in tokens, (wh, ww) or one number for both.
        shift: of the roll, (up, left) or one number, less than the window. A map that is one window is shifted too when
            asked: whoever follows the classification models passes 0 there.
        heads: number of heads; C = heads * d.
        scale: of the scores; default 1 / sqrt(d).
        pad: None, then the map is whole windows; or what happens first where it is not: "pad_then_roll" (detection and
            segmentation models) or "roll_then_pad" (timm). Padding is a key like any other, as in those models.
        qkv_bias: (3C) bias of the projection, which is the q, k and v of padding because padding enters it as zeros;
            None for a projection without one. Its gradient here is the part that comes through padding, besides the one
            that comes through qkv.
        group: (H, W) or (B, H, W), integers from 0 to 2**31 - 1: a token sees only those with its own number (MixMIM).
            Padding is seen by every group.
        mask_value: added to the score of a pair that only the roll brought together, 0 or less; float("-inf") allowed.
        checked: read the group ids back and raise on a bad one; waits for the device, and is not for torch.compile.
        impl: "auto", or one of IMPLS, which then runs or raises. "sdpa" is torch's own attention over gathered windows.
    Returns:
        (B, H, W, C) in the dtype of qkv, heads merged, contiguous; autocast does not change it. Gradients of qkv, table
        and qkv_bias are accumulated in float32 in a fixed order; for "sdpa" see mimfast/ops/_windows_sdpa.py.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also a group id out of range.
    """
    op, window, shift = "window_attention", pair(window), pair(shift)
    check_call(op, qkv, window, shift, heads, pad, qkv_bias, group, mask_value)
    if table is not None:
        check_table(op, "table", table, qkv, window, heads)
    if checked and group is not None:
        check_ids(op, group)
    chosen = resolve(op, impl, IMPLS, partial(why_not, qkv, window, heads))
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else float(scale)
    if chosen in ("ref", "sdpa"):
        by_torch = attend if chosen == "sdpa" and len(qkv) else window_attention_ref  # it forgets the bias of no image
        with torch.autocast(qkv.device.type, enabled=False):  # a product in fewer bits is not this op
            return by_torch(
                qkv, table, window, shift, heads, scale=scale, pad=pad, qkv_bias=qkv_bias, group=group,
                mask_value=mask_value,
            )  # fmt: skip
    config = ([*window], [*shift], heads, scale, pad or "pad_then_roll", float(mask_value), chosen)
    return _WindowAttention.apply(qkv, table, qkv_bias, None if group is None else ids_of(group), config)


# contract: define + impl + register_fake under a thin autograd.Function, for the launch cost (see noop.py). A gradient
# of what was not given is empty.
_INPUTS = "Tensor qkv, Tensor? table, Tensor? qkv_bias, Tensor? group"
_CONFIG = "int[] window, int[] shift, int heads, float scale, str pad, float mask_value, str impl"
torch.library.define("mimfast::window_attention_fwd", f"({_INPUTS}, {_CONFIG}) -> Tensor")
torch.library.define(
    "mimfast::window_attention_bwd",
    f"(Tensor grad, {_INPUTS}, {_CONFIG}) -> (Tensor d_qkv, Tensor d_table, Tensor d_bias)",
)


@torch.library.impl("mimfast::window_attention_fwd", ("cpu", "cuda"))
def _fwd(*args):
    if args[-1] == "triton":
        from mimfast.kernels.window_attention import window_attention_fwd

        return window_attention_fwd(*args[:-1])
    out = _fwd_fake(*args)
    _run_native(*args, out=out)
    return out


@torch.library.impl("mimfast::window_attention_bwd", ("cpu", "cuda"))
def _bwd(grad, *args):
    if args[-1] == "triton":
        from mimfast.kernels.window_attention import window_attention_bwd

        return window_attention_bwd(grad, *args[:-1])[:3]
    d_qkv, d_table, d_bias = _bwd_fake(grad, *args)
    _run_native(*args, grad=grad, d_qkv=d_qkv, d_table=d_table, d_bias=d_bias)
    return d_qkv, d_table, d_bias


def _run_native(*args, **tensors):
    if args[-1] == "cuda":
        run_cuda(_native.core(), *args[:-1], **tensors)
    else:
        run_cpu(*args[:-1], **tensors)


@torch.library.register_fake("mimfast::window_attention_fwd")
def _fwd_fake(qkv, *_):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@torch.library.register_fake("mimfast::window_attention_bwd")
def _bwd_fake(grad, qkv, table, qkv_bias, *_):  # noqa: ARG001
    shapes = ((0,) if x is None else x.shape for x in (table, qkv_bias))
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, qkv_bias, group, config):
        ctx.save_for_backward(qkv, table, qkv_bias, group)
        ctx.config = config
        return torch.ops.mimfast.window_attention_fwd(qkv, table, qkv_bias, group, *config)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = torch.ops.mimfast.window_attention_bwd(grad, *inputs, *ctx.config)
        return *(None if x is None else d.to(x.dtype) for x, d in zip(inputs, grads)), None, None
