"""Loss of predicted against true pixels over hidden patches. MAE, arXiv:2111.06377, section 3.

target t of a patch: its p*p*3 values in (py, px, c) order; with `norm` (t - mean) / sqrt(var + eps), mean and variance
over all p*p*3 values together, variance unbiased (the paper says "standard deviation"; the authors' code divides by
n - 1).
loss = mean over hidden patches of the mean over D of f(pred - t), f(d) = d^2 | |d| | smooth_l1(d, beta).
B batch, L patches in row-major order, D = p*p*3, C = 3 channels, H W pixels, M hidden patches per image
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("triton", "ref")
KINDS = ("mse", "l1", "smooth_l1")
Kind = Literal["mse", "l1", "smooth_l1"]


def pixel_loss_ref(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6, beta: float = 1.0,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(pred.dtype, torch.float32)
    hidden_BL = _hidden_map(hidden, pred)
    target_BLD = _patches(normalize(img, mean, std, wide).to(wide), patch)
    if norm:
        var_BL1, mean_BL1 = torch.var_mean(target_BLD, dim=-1, keepdim=True)
        target_BLD = (target_BLD - mean_BL1) / (var_BL1 + eps).sqrt()
    # masked before the loss, so that nothing in a visible patch, NaN included, reaches the loss or the gradient
    diff_BLD = torch.where(hidden_BL[..., None], pred.to(wide) - target_BLD, 0.0)
    if kind == "mse":
        loss_BLD = diff_BLD.square()
    elif kind == "l1":
        loss_BLD = diff_BLD.abs()
    else:
        loss_BLD = F.smooth_l1_loss(diff_BLD, torch.zeros_like(diff_BLD), reduction="none", beta=beta)
    return loss_BLD.sum() / (hidden_BL.sum().clamp(min=1) * pred.shape[-1])


def pixel_loss(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6, beta: float = 1.0, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Score predicted pixels against the image, over the hidden patches only.

    Args:
        pred: (B, L, D) float32, bfloat16 or float16 (float64 runs `ref`); values in (py, px, c) order; any strides.
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides. H and W
            are multiples of `patch`, and L = H/patch * W/patch.
        hidden: (B, L) bool, True = hidden; or (B, M) int64, distinct indices of the hidden patches.
        patch: side of a patch in pixels; D = patch * patch * 3.
        norm: compare with (t - mean) / sqrt(var + eps) of each patch instead of t.
        kind: f in the formula above.
        mean: per channel, of values in 0..1; for uint8 images.
        std: per channel, of values in 0..1; for uint8 images.
        eps: added to the variance of a patch.
        beta: where smooth_l1 turns from square to linear, > 0.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        Scalar, float32 (float64 for float64 `pred`). Without any hidden patch it is 0 and so is its gradient. The
        gradient of `pred` is 0 in visible patches, whatever they hold.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call.
    """
    _check(pred, img, hidden, patch, kind, beta)
    chosen = resolve("pixel_loss", impl, IMPLS, partial(_why_not, pred, img, patch))
    if chosen == "ref":
        return pixel_loss_ref(
            pred, img, hidden, patch=patch, norm=norm, kind=kind, mean=mean, std=std, eps=eps, beta=beta
        )
    hidden_BL = _hidden_map(hidden, pred)
    # compiled code may not overwrite what its forward saved, so there the backward computes the gradient afresh
    grad = torch.is_grad_enabled() and pred.requires_grad and not torch.compiler.is_compiling()
    return _PixelLoss.apply(pred, img, hidden_BL, (patch, norm, kind, [*mean], [*std], eps, beta), grad, chosen)


def _check(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, kind: str, beta: float) -> None:
    op = "pixel_loss"
    check_dtype(
        op, "pred", pred, (torch.float32, torch.bfloat16, torch.float16, torch.float64), "it is compared with pixels"
    )
    check_dtype(
        op, "img", img, (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64), "it holds pixels"
    )
    check_dtype(op, "hidden", hidden, (torch.bool, torch.int64), "it is a map of hidden patches or their indices")
    check_same_device(op, pred=pred, img=img, hidden=hidden)
    if patch < 1:
        fail(op, "patch", patch, "1 or more", "it is the side of a patch in pixels")
    if kind not in KINDS:
        fail(op, "kind", repr(kind), " or ".join(map(repr, KINDS)), "no other loss is defined")
    if not beta > 0:
        fail(op, "beta", beta, "a number above 0", "smooth_l1 divides by it; kind='l1' is its limit")
    check_shape(op, "img", img, (None, 3, None, None), "an image batch is (B, 3, H, W)")
    B, _, H, W = img.shape
    if H % patch or W % patch:
        fail(
            op,
            "img",
            f"{H} x {W} pixels",
            f"multiples of {patch}",
            f"patches are {patch} x {patch} pixels and none may be cut",
        )
    L, D = (H // patch) * (W // patch), patch * patch * 3
    grid = f"{H}/{patch} x {W}/{patch} gives {L} patches of {patch} * {patch} * 3 = {D} values"
    check_shape(op, "pred", pred, (B, L, D), grid)
    check_shape(op, "hidden", hidden, (B, L if hidden.dtype == torch.bool else None), grid)


def _why_not(pred: Tensor, img: Tensor, patch: int, impl: str) -> str | None:
    if pred.dtype == torch.float64 or img.dtype == torch.float64:
        return "the kernel computes in float32 and was given float64"
    if img.requires_grad and torch.is_grad_enabled():
        return "the kernel has no gradient for img"
    if patch > 32:
        return f"the kernel keeps a patch in registers, which suits sides up to 32, not {patch}"
    return why_not_on(impl, pred.device.type)


def _hidden_map(hidden: Tensor, pred: Tensor) -> Tensor:
    if hidden.dtype == torch.bool:
        return hidden
    return torch.zeros(pred.shape[:2], dtype=torch.bool, device=pred.device).scatter_(1, hidden, True)


def _patches(img_BCHW: Tensor, patch: int) -> Tensor:
    B, C, H, W = img_BCHW.shape
    tiles = img_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch * C)


# contract: define + impl + register_fake under a thin autograd.Function, for the launch cost (see noop.py). When asked
# to, the forward leaves the gradient for an upstream gradient of 1; the backward corrects it or computes it anew.
_CONFIG = "int patch, bool norm, str kind, float[] mean, float[] std, float eps, float beta"
torch.library.define(
    "mimfast::pixel_loss_fwd",
    f"(Tensor pred, Tensor img, Tensor hidden, {_CONFIG}, bool grad, str impl) "
    "-> (Tensor loss, Tensor d_pred, Tensor count)",
)
torch.library.define(
    "mimfast::pixel_loss_bwd",
    "(Tensor(a!) d_pred, Tensor pred, Tensor img, Tensor hidden, Tensor count, Tensor upstream, "
    f"{_CONFIG}, bool stale, str impl) -> ()",
)


@torch.library.impl("mimfast::pixel_loss_fwd", ("cpu", "cuda"))
def _fwd(*args):
    from mimfast.kernels.pixel_loss import pixel_loss_fwd

    return pixel_loss_fwd(*args[:-1])  # the last one is impl, and triton is the only one so far


@torch.library.impl("mimfast::pixel_loss_bwd", ("cpu", "cuda"))
def _bwd(*args):
    from mimfast.kernels.pixel_loss import pixel_loss_bwd

    pixel_loss_bwd(*args[:-1])


@torch.library.register_fake("mimfast::pixel_loss_fwd")
def _fwd_fake(pred, img, hidden, patch, norm, kind, mean, std, eps, beta, grad, impl):  # noqa: ARG001
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    return loss, pred.new_empty(pred.shape if grad else (0,)), torch.empty_like(loss, dtype=torch.int64)


@torch.library.register_fake("mimfast::pixel_loss_bwd")
def _bwd_fake(*args):
    pass


class _PixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, img, hidden, config, grad, impl):
        loss, d_pred, count = torch.ops.mimfast.pixel_loss_fwd(pred, img, hidden, *config, grad, impl)
        ctx.save_for_backward(d_pred, pred, img, hidden, count)
        ctx.config, ctx.impl = config, impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_pred, *rest = ctx.saved_tensors
        stale = d_pred.shape != rest[0].shape or _may_run_again()
        if stale:
            d_pred = torch.empty_like(rest[0], memory_format=torch.contiguous_format)
        torch.ops.mimfast.pixel_loss_bwd(d_pred, *rest, upstream, *ctx.config, stale, ctx.impl)
        return d_pred, None, None, None, None, None


def _may_run_again() -> bool:
    """Whether the caller keeps the graph (retain_graph): then the saved gradient must not be handed out."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
