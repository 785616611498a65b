"""What the losses over hidden tokens share: layouts of predictions, checks, the reference of the tail, the autograd.

loss = mean over hidden tokens of the mean over D of f(pred - t), f(d) = d^2 | |d| | smooth_l1(d, beta).
B batch, L tokens in row-major order, R rows of predictions per image: L, or M in the compact layout, D values per row
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast._check import check_dtype, check_indices, check_same_device, fail

KINDS = ("mse", "l1", "smooth_l1")
Kind = Literal["mse", "l1", "smooth_l1"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tail(op: str, pred: Tensor, img: Tensor, hidden: Tensor, kind: str, beta: float) -> None:
    """What can be said without the shapes."""
    check_dtype(op, "pred", pred, FLOATS, "it is compared with what the image gives")
    check_dtype(op, "img", img, (torch.uint8, *FLOATS), "it holds pixels")
    check_dtype(op, "hidden", hidden, (torch.bool, torch.int64), "it is a map of what is hidden or holds its indices")
    check_same_device(op, pred=pred, img=img, hidden=hidden)
    if kind not in KINDS:
        fail(op, "kind", repr(kind), " or ".join(map(repr, KINDS)), "no other loss is defined")
    if not beta > 0:
        fail(op, "beta", beta, "a number above 0", "smooth_l1 divides by it; kind='l1' is its limit")


def check_named(op: str, hidden: Tensor, L: int) -> None:
    """Raise on a bad index of hidden tokens. Waits for the device."""
    if hidden.dtype == torch.int64:
        check_indices(op, "hidden", hidden, L, f"it names hidden patches of the image's {L}, each once")


def why_not_given(op_impl: str, pred: Tensor, img: Tensor) -> str | None:
    """Why the compiled code cannot take these tensors."""
    if pred.dtype == torch.float64 or img.dtype == torch.float64:
        return "the kernel computes in float32 and was given float64"
    if img.requires_grad and torch.is_grad_enabled():
        return "the kernel has no gradient for img"
    if op_impl == "cpu" and pred.dtype == torch.float16:
        return "the native CPU code takes float32 and bfloat16 predictions and was given float16"
    return None


def compact(pred: Tensor, hidden: Tensor) -> bool:
    """Whether row m of `pred` is for token hidden[b, m]."""
    return hidden.dtype == torch.int64 and pred.shape[1:2] == hidden.shape[1:]


def hidden_map(hidden: Tensor, L: int) -> Tensor:
    """(B, L) bool of a map or of indices in any order; those out of range count for nothing."""
    if hidden.dtype == torch.bool:
        return hidden
    map_BL = torch.zeros(len(hidden), L + 1, dtype=torch.bool, device=hidden.device)  # indices out of range end in L
    return map_BL.scatter_(1, torch.where((hidden >= 0) & (hidden < L), hidden, L), True)[:, :L]


def mean_loss(pred: Tensor, target: Tensor, counts: Tensor, kind: Kind, beta: float) -> Tensor:
    """The tail. pred and target (B, R, D), counts a bool that broadcasts to them, of the size of what is counted."""
    # masked before the loss, so that nothing in a visible token, NaN included, reaches the loss or the gradient
    diff = torch.where(counts, pred.to(target.dtype) - target, 0.0)
    if kind == "mse":
        loss = diff.square()
    elif kind == "l1":
        loss = diff.abs()
    else:
        loss = F.smooth_l1_loss(diff, torch.zeros_like(diff), reduction="none", beta=beta)
    return loss.sum() / (counts.sum() * (diff.numel() // max(counts.numel(), 1))).clamp(min=1)


def fused(op: str, pred: Tensor, img: Tensor, hidden: Tensor, config: tuple, impl: str) -> Tensor:
    """The loss by mimfast::<op>_fwd, with its gradient by mimfast::<op>_bwd."""
    # compiled code may not overwrite what its forward saved, so there the backward computes the gradient afresh
    grad = torch.is_grad_enabled() and pred.requires_grad and not torch.compiler.is_compiling()
    return _Loss.apply(op, pred, img, hidden, config, grad, impl)


# define + impl + register_fake under a thin autograd.Function, for the launch cost (see noop.py). When asked to, the
# forward leaves the gradient for an upstream gradient of 1; the backward corrects it or computes it anew.
def define(op: str, config: str, fwd: Callable, bwd: Callable) -> None:
    """The contract of one loss. `config` is the part of the schema that only it has."""
    torch.library.define(
        f"mimfast::{op}_fwd",
        f"(Tensor pred, Tensor img, Tensor hidden, {config}, bool grad, str impl) "
        "-> (Tensor loss, Tensor d_pred, Tensor count)",
    )
    torch.library.define(
        f"mimfast::{op}_bwd",
        "(Tensor(a!) d_pred, Tensor pred, Tensor img, Tensor hidden, Tensor count, Tensor upstream, "
        f"{config}, bool stale, str impl) -> ()",
    )
    torch.library.impl(f"mimfast::{op}_fwd", ("cpu", "cuda"), fwd)
    torch.library.impl(f"mimfast::{op}_bwd", ("cpu", "cuda"), bwd)
    torch.library.register_fake(f"mimfast::{op}_fwd", lambda pred, *rest: outputs(pred, rest[-2]))
    torch.library.register_fake(f"mimfast::{op}_bwd", lambda *_: None)


def outputs(pred: Tensor, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient (empty unless `grad`) and count of what is hidden, not filled."""
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    return loss, pred.new_empty(pred.shape if grad else (0,)), torch.empty_like(loss, dtype=torch.int64)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, pred, img, hidden, config, grad, impl):
        loss, d_pred, count = getattr(torch.ops.mimfast, f"{op}_fwd")(pred, img, hidden, *config, grad, impl)
        ctx.save_for_backward(d_pred, pred, img, hidden, count)
        ctx.op, ctx.config, ctx.impl = op, config, impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_pred, *rest = ctx.saved_tensors
        stale = d_pred.shape != rest[0].shape or _may_run_again()
        if stale:
            d_pred = torch.empty_like(rest[0], memory_format=torch.contiguous_format)
        getattr(torch.ops.mimfast, f"{ctx.op}_bwd")(d_pred, *rest, upstream, *ctx.config, stale, ctx.impl)
        return None, d_pred, None, None, None, None, None


def _may_run_again() -> bool:
    """Whether the caller keeps the graph (retain_graph): then the saved gradient must not be handed out."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def count(hidden: Tensor, L: int) -> Tensor:
    """How many tokens, or parts of tokens, count: [] int64, with as few launches as torch allows."""
    return hidden.sum() if hidden.dtype == torch.bool else (hidden.clamp(0, L - 1) == hidden).sum()


def native_rows(
    core: ModuleType, pred: Tensor, hidden: Tensor, L: int, kind: Kind, beta: float, upstream: float,
    loss: Tensor | None, d_pred: Tensor | None,
) -> Any:  # fmt: skip
    """LossRows of csrc/loss_tail.h. `pred` has a dense last dimension, `hidden` is contiguous; keep both alive."""
    mapped = hidden.dtype == torch.bool
    return core.LossRows(
        pred=pred.data_ptr(), pred_bf16=pred.dtype == torch.bfloat16, pred_stride=pred.stride()[:2],
        map=hidden.data_ptr() if mapped else 0, index=0 if mapped else hidden.data_ptr(), batch=pred.shape[0],
        rows=pred.shape[1], tokens=L, values=pred.shape[2], kind=KINDS.index(kind), beta=beta,
        upstream=float(upstream), loss=0 if loss is None else loss.data_ptr(),
        grad=0 if d_pred is None else d_pred.data_ptr(),
    )  # fmt: skip
