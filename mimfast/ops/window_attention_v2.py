"""Shifted-window attention with cosine scores, from packed q, k, v to merged heads, both in image order.

Swin Transformer V2, arXiv:2111.09883, section 3.2, with the clamp of its code. As window_attention, but the score of a
query and a key is exp(min(logit_scale, ln 100)) * (q / |q|) . (k / |k|) + table[offset] + mask. Norms, scores and
softmax are float32 whatever qkv is: near 100 the steps of bfloat16 are 0.5. A row whose norm is below 1e-12 (the key of
padding is 0, because it has no bias) is divided by 1e-12 and has no gradient.
B images, H W map in tokens, C width, E = 3C packed as [3, heads, d], h heads
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast import _native
from mimfast._check import check_dtype, check_same_device, fail
from mimfast.ops._choice import Impl, resolve
from mimfast.ops._windows import FLOATS, Side, check_call, check_ids, check_table, ids_of, pair, why_not
from mimfast.ops._windows_native import run_cpu, run_cuda
from mimfast.ops._windows_sdpa import attend
from mimfast.ops.window_attention import window_attention_ref

IMPLS = ("cuda", "triton", "cpu", "sdpa", "ref")
LARGEST = math.log(100.0)  # of logit_scale
SMALLEST = 1e-12  # of a norm


def window_attention_v2_ref(
    qkv: Tensor, table: Tensor | None, logit_scale: Tensor, window: Side, shift: Side, heads: int, *,
    pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None, mask_value: float = -100.0,
    attention: Callable[..., Tensor] = window_attention_ref,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(qkv.dtype, torch.float32)
    factor_h1 = logit_scale.to(wide).flatten().clamp(max=LARGEST).exp()[:, None]

    def unit(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        direction = x / norm.clamp(min=SMALLEST)
        return torch.where(norm < SMALLEST, direction.detach(), direction)

    def scaled(x_E: Tensor) -> Tensor:
        q, k, v = x_E.to(wide).unflatten(-1, (3, heads, -1)).unbind(-3)
        return torch.stack([unit(q) * factor_h1, unit(k), v], -3).flatten(-3)

    bias = None if qkv_bias is None else scaled(qkv_bias)
    out = attention(
        scaled(qkv), table, window, shift, heads, scale=1.0, pad=pad, qkv_bias=bias, group=group, mask_value=mask_value
    )
    return out.to(qkv.dtype)


def window_attention_v2(
    qkv: Tensor, table: Tensor | None, logit_scale: Tensor, window: Side, shift: Side, heads: int, *,
    pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None, mask_value: float = -100.0,
    checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attend by cosine inside the windows of a map.

    Args:
        qkv: as in window_attention.
        table: ((2 wh - 1) * (2 ww - 1), heads), bias of each offset as there: in Swin V2 16 * sigmoid of what its
            MLP makes of the offsets, computed by the caller once, because it depends on parameters alone. Keep it in
            float32, near 16 bfloat16 errs by 0.03.
        logit_scale: (heads,) or (heads, 1, 1), logarithm of the factor of the scores; clamped at ln 100 here, with no
            gradient above. Any floating dtype.
        window: as in window_attention, and so are `shift`, `heads`, `pad`, `group`, `mask_value`, `checked`.
        qkv_bias: (3C), [q bias | 0 | v bias] in Swin V2.
        impl: "auto", or one of IMPLS, which then runs or raises. "sdpa" is torch's own attention over gathered windows,
            in float32 whatever qkv is, because torch takes q, k and bias in one dtype and a half type blurs the scores.
    Returns:
        (B, H, W, C) in the dtype of qkv, heads merged, contiguous; autocast does not change it. Gradients of qkv,
        table, logit_scale and qkv_bias are accumulated in float32 in a fixed order; for "sdpa" see
        mimfast/ops/_windows_sdpa.py.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also a group id out of range.
    """
    op, window, shift = "window_attention_v2", pair(window), pair(shift)
    check_call(op, qkv, window, shift, heads, pad, qkv_bias, group, mask_value)
    if table is not None:
        check_table(op, "table", table, qkv, window, heads)
    check_dtype(op, "logit_scale", logit_scale, FLOATS, "it is the logarithm of a factor")
    check_same_device(op, qkv=qkv, logit_scale=logit_scale)
    if logit_scale.shape not in ((heads,), (heads, 1, 1)):
        wanted = f"({heads}) or ({heads}, 1, 1)"
        fail(op, "logit_scale", f"shape {tuple(logit_scale.shape)}", wanted, f"each of the {heads} heads has one")
    if checked and group is not None:
        check_ids(op, group)
    chosen = resolve(op, impl, IMPLS, partial(why_not, qkv, window, heads))
    with torch.autocast(qkv.device.type, enabled=False):  # a product in fewer bits is not this op
        if chosen in ("ref", "sdpa"):
            return window_attention_v2_ref(
                qkv, table, logit_scale, window, shift, heads, pad=pad, qkv_bias=qkv_bias, group=group,
                mask_value=mask_value, attention=attend if chosen == "sdpa" and len(qkv) else window_attention_ref,
            )  # fmt: skip
        factor = logit_scale.float().flatten().clamp(max=LARGEST).exp()  # the parameter is clamped, not the factor
    config = ([*window], [*shift], heads, pad or "pad_then_roll", float(mask_value), chosen)
    return _WindowAttentionV2.apply(qkv, table, qkv_bias, factor, None if group is None else ids_of(group), config)


# contract: as in window_attention.py, with `factor` (heads) float32 of the scores
_INPUTS = "Tensor qkv, Tensor? table, Tensor? qkv_bias, Tensor factor, Tensor? group"
_CONFIG = "int[] window, int[] shift, int heads, str pad, float mask_value, str impl"
torch.library.define("mimfast::window_attention_v2_fwd", f"({_INPUTS}, {_CONFIG}) -> Tensor")
torch.library.define(
    "mimfast::window_attention_v2_bwd",
    f"(Tensor grad, {_INPUTS}, {_CONFIG}) -> (Tensor d_qkv, Tensor d_table, Tensor d_bias, Tensor d_factor)",
)


@torch.library.impl("mimfast::window_attention_v2_fwd", ("cpu", "cuda"))
def _fwd(*args):
    if args[-1] == "triton":
        from mimfast.kernels.window_attention_v2 import window_attention_v2_fwd

        return window_attention_v2_fwd(**_named(*args))
    out = _fwd_fake(*args)
    _run_native(*args, out=out)
    return out


@torch.library.impl("mimfast::window_attention_v2_bwd", ("cpu", "cuda"))
def _bwd(grad, *args):
    if args[-1] == "triton":
        from mimfast.kernels.window_attention_v2 import window_attention_v2_bwd

        return window_attention_v2_bwd(grad, **_named(*args))
    d_qkv, d_table, d_bias, d_factor = _bwd_fake(grad, *args)
    _run_native(*args, grad=grad, d_qkv=d_qkv, d_table=d_table, d_bias=d_bias, d_head_scale=d_factor)
    return d_qkv, d_table, d_bias, d_factor


def _run_native(*args, **tensors):
    if args[-1] == "cuda":
        run_cuda(_native.core(), **_named(*args), **tensors)
    else:
        run_cpu(**_named(*args), **tensors)


def _named(qkv, table, qkv_bias, factor, group, window, shift, heads, pad, mask_value, _):
    """The arguments of both implementations, which are those of window_attention."""
    names = {"qkv": qkv, "table": table, "qkv_bias": qkv_bias, "group": group, "window": window, "shift": shift}
    return names | {"heads": heads, "scale": 1.0, "pad": pad, "mask_value": mask_value, "head_scale": factor}


@torch.library.register_fake("mimfast::window_attention_v2_fwd")
def _fwd_fake(qkv, *_):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@torch.library.register_fake("mimfast::window_attention_v2_bwd")
def _bwd_fake(grad, qkv, table, qkv_bias, factor, *_):  # noqa: ARG001
    shapes = ((0,) if x is None else x.shape for x in (table, qkv_bias, factor))
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _WindowAttentionV2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, qkv_bias, factor, group, config):
        ctx.save_for_backward(qkv, table, qkv_bias, factor, group)
        ctx.config = config
        return torch.ops.mimfast.window_attention_v2_fwd(qkv, table, qkv_bias, factor, group, *config)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = torch.ops.mimfast.window_attention_v2_bwd(grad, *inputs, *ctx.config)
        return *(None if x is None else d.to(x.dtype) for x, d in zip(inputs, grads)), None, None
