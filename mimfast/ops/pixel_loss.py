"""Loss of predicted against true pixels over hidden patches. MAE, arXiv:2111.06377, section 3.

target t of a patch: its p*p*3 values in (py, px, c) order; with `norm` (t - mean) / sqrt(var + eps), mean and variance
over all p*p*3 values together, variance unbiased (the paper says "standard deviation"; the authors' code divides by
n - 1).
loss = mean over hidden patches of the mean over D of f(pred - t), f(d) = d^2 | |d| | smooth_l1(d, beta).
B batch, L patches in row-major order, D = p*p*3, C = 3 channels, H W pixels, M hidden patches per image, R rows of
predictions per image: L, or M in the compact layout
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast import _native
from mimfast._check import check_dtype, check_indices, check_same_device, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("triton", "cpu", "ref")
KINDS = ("mse", "l1", "smooth_l1")
Kind = Literal["mse", "l1", "smooth_l1"]


def pixel_loss_ref(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6, beta: float = 1.0,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(pred.dtype, torch.float32)
    if _compact(pred, hidden):
        counts_BR = (hidden >= 0) & (hidden < (img.shape[2] // patch) * (img.shape[3] // patch))
        tiles_BRCpq = _patches(img, patch, torch.where(counts_BR, hidden, 0))
    else:
        counts_BR, tiles_BRCpq = _hidden_map(hidden, pred.shape[1]), _patches(img, patch, None)
    target_BRD = normalize(tiles_BRCpq, mean, std, wide).to(wide).movedim(2, -1).flatten(2)
    if norm:
        var_BR1, mean_BR1 = torch.var_mean(target_BRD, dim=-1, keepdim=True)
        target_BRD = (target_BRD - mean_BR1) / (var_BR1 + eps).sqrt()
    # masked before the loss, so that nothing in a visible patch, NaN included, reaches the loss or the gradient
    diff_BRD = torch.where(counts_BR[..., None], pred.to(wide) - target_BRD, 0.0)
    if kind == "mse":
        loss_BRD = diff_BRD.square()
    elif kind == "l1":
        loss_BRD = diff_BRD.abs()
    else:
        loss_BRD = F.smooth_l1_loss(diff_BRD, torch.zeros_like(diff_BRD), reduction="none", beta=beta)
    return loss_BRD.sum() / (counts_BR.sum().clamp(min=1) * pred.shape[-1])


def pixel_loss(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6, beta: float = 1.0,
    checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Score predicted pixels against the image, over the hidden patches only.

    Args:
        pred: (B, L, D), row l predicting patch l, or compact: (B, M, D) beside (B, M) indices, row m predicting patch
            hidden[b, m]. As many rows as indices always mean compact. float32, bfloat16 or float16 (float64 runs
            `ref`); values in (py, px, c) order; any strides.
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides. H and W
            are multiples of `patch`, and L = H/patch * W/patch.
        hidden: (B, L) bool, True = hidden; or (B, M) int64, distinct indices of the hidden patches in any order. One
            outside 0..L-1 counts for nothing, so that images with fewer hidden patches can be filled up with -1.
        patch: side of a patch in pixels; D = patch * patch * 3.
        norm: compare with (t - mean) / sqrt(var + eps) of each patch instead of t.
        kind: f in the formula above.
        mean: per channel, of values in 0..1; for uint8 images.
        std: per channel, of values in 0..1; for uint8 images.
        eps: added to the variance of a patch.
        beta: where smooth_l1 turns from square to linear, > 0.
        checked: read the indices back and raise on a bad one; waits for the device, and torch.compile cannot trace it.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        Scalar, float32 (float64 for float64 `pred`). Without any hidden patch it is 0 and so is its gradient. The
        gradient of `pred` is 0 in visible patches, whatever they hold.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also an index outside 0..L-1 or given twice for one image.
    """
    _check(pred, img, hidden, patch, kind, beta)
    if checked and hidden.dtype == torch.int64:
        L = (img.shape[2] // patch) * (img.shape[3] // patch)
        check_indices("pixel_loss", "hidden", hidden, L, f"it names hidden patches of the image's {L}, each once")
    chosen = resolve("pixel_loss", impl, IMPLS, partial(_why_not, pred, img, patch))
    if chosen == "ref":
        return pixel_loss_ref(
            pred, img, hidden, patch=patch, norm=norm, kind=kind, mean=mean, std=std, eps=eps, beta=beta
        )
    if not _compact(pred, hidden):
        hidden = _hidden_map(hidden, pred.shape[1])
    # compiled code may not overwrite what its forward saved, so there the backward computes the gradient afresh
    grad = torch.is_grad_enabled() and pred.requires_grad and not torch.compiler.is_compiling()
    return _PixelLoss.apply(pred, img, hidden, (patch, norm, kind, [*mean], [*std], eps, beta), grad, chosen)


def _check(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, kind: str, beta: float) -> None:
    op = "pixel_loss"
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_dtype(op, "pred", pred, floats, "it is compared with pixels")
    check_dtype(op, "img", img, (torch.uint8, *floats), "it holds pixels")
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
    if H % patch or W % patch or not H * W:
        found = f"{H} x {W} pixels"
        fail(op, "img", found, f"multiples of {patch}", f"patches are {patch} x {patch} pixels and none may be cut")
    L, D = (H // patch) * (W // patch), patch * patch * 3
    because = f"{H}/{patch} x {W}/{patch} gives {L} patches of {patch} * {patch} * 3 = {D} values"
    indices = hidden.dtype == torch.int64
    check_shape(op, "hidden", hidden, (B, None if indices else L), because)
    if indices and pred.shape[1:2] != (L,):
        because += f", or to one row for each of the {hidden.shape[1]} indices"
    check_shape(op, "pred", pred, (B, hidden.shape[1] if _compact(pred, hidden) else L, D), because)


def _why_not(pred: Tensor, img: Tensor, patch: int, impl: str) -> str | None:
    if pred.dtype == torch.float64 or img.dtype == torch.float64:
        return "the kernel computes in float32 and was given float64"
    if img.requires_grad and torch.is_grad_enabled():
        return "the kernel has no gradient for img"
    if impl == "triton" and patch > 32:
        return f"the kernel keeps a patch in registers, which suits sides up to 32, not {patch}"
    if impl == "cpu" and pred.dtype == torch.float16:
        return "the native CPU code takes float32 and bfloat16 predictions and was given float16"
    return why_not_on(impl, pred.device.type)


def _compact(pred: Tensor, hidden: Tensor) -> bool:
    return hidden.dtype == torch.int64 and pred.shape[1:2] == hidden.shape[1:]


def _hidden_map(hidden: Tensor, L: int) -> Tensor:
    if hidden.dtype == torch.bool:
        return hidden
    map_BL = torch.zeros(len(hidden), L + 1, dtype=torch.bool, device=hidden.device)  # indices out of range end in L
    return map_BL.scatter_(1, torch.where((hidden >= 0) & (hidden < L), hidden, L), True)[:, :L]


def _patches(img_BCHW: Tensor, patch: int, index_BR: Tensor | None) -> Tensor:
    """(B, R, C, py, px), all patches or those of valid indices; no other pixel is read."""
    B, C, H, W = img_BCHW.shape
    tiles = img_BCHW.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    if index_BR is None:
        return tiles.flatten(1, 2)
    b_B1, cols = torch.arange(B, device=index_BR.device)[:, None], W // patch
    return tiles[b_B1, index_BR // cols, index_BR % cols]


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
    if args[-1] == "triton":
        from mimfast.kernels.pixel_loss import pixel_loss_fwd

        return pixel_loss_fwd(*args[:-1])
    loss, d_pred, count = _fwd_fake(*args)
    _run_cpu(args[:-2], 1.0, loss, d_pred if args[-2] else None)
    return loss, d_pred, count.zero_()  # the native backward does not read it, counting again takes no time


@torch.library.impl("mimfast::pixel_loss_bwd", ("cpu", "cuda"))
def _bwd(*args):
    if args[-1] == "triton":
        from mimfast.kernels.pixel_loss import pixel_loss_bwd

        return pixel_loss_bwd(*args[:-1])
    d_pred, pred, img, hidden, _, upstream, *config, stale, _ = args
    if stale or upstream != 1:
        _run_cpu((pred, img, hidden, *config), upstream, None, d_pred)


def _run_cpu(inputs, upstream, loss, d_pred):
    pred, img, hidden, patch, norm, kind, mean, std, eps, beta = inputs
    core = _native.core()
    assert core is not None  # or `resolve` would have refused
    pred, hidden = pred if pred.stride(-1) == 1 else pred.contiguous(), hidden.contiguous()
    img = img if img.dtype == torch.uint8 else img.float()
    mapped = hidden.dtype == torch.bool
    call = core.PixelLoss(
        pred=pred.data_ptr(), pred_bf16=pred.dtype == torch.bfloat16, pred_stride=pred.stride()[:2],
        img=img.data_ptr(), img_uint8=img.dtype == torch.uint8, img_stride=img.stride(),
        map=hidden.data_ptr() if mapped else 0, index=0 if mapped else hidden.data_ptr(), batch=pred.shape[0],
        rows=pred.shape[1], grid_rows=img.shape[2] // patch, grid_cols=img.shape[3] // patch, patch=patch, norm=norm,
        kind=KINDS.index(kind), mean=mean, std=std, eps=eps, beta=beta, upstream=float(upstream),
        loss=0 if loss is None else loss.data_ptr(), grad=0 if d_pred is None else d_pred.data_ptr(),
    )  # fmt: skip
    core.pixel_loss_cpu(call, torch.get_num_threads())


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
