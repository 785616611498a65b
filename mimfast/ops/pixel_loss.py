"""Loss of predicted against true pixels over hidden patches. MAE, arXiv:2111.06377, section 3.

target t of a patch: its p*p*3 values in (py, px, c) order, "pqc", or in (c, py, px) order, "cpq", as SimMIM's
PixelShuffle head writes them (arXiv:2111.09886); with `norm` (t - mean) / sqrt(var + eps), mean and variance over all
p*p*3 values together, variance unbiased (the paper says "standard deviation"; the authors' code divides by n - 1).
loss = mean over hidden patches of the mean over D of f(pred - t), f(d) = d^2 | |d| | smooth_l1(d, beta).
B batch, L patches in row-major order, D = p*p*3, C = 3 channels, H W pixels, p q rows and columns of a patch, M hidden
patches per image, R rows of predictions per image: L, or M in the compact layout
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.ops import _losses
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._losses import KINDS as KINDS
from mimfast.ops._losses import Kind, compact, hidden_map

IMPLS = ("triton", "cpu", "ref")
ORDERS = ("pqc", "cpq")
Order = Literal["pqc", "cpq"]


def pixel_loss_ref(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    order: Order = "pqc", mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6,
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(pred.dtype, torch.float32)
    if compact(pred, hidden):
        counts_BR = (hidden >= 0) & (hidden < (img.shape[2] // patch) * (img.shape[3] // patch))
        tiles_BRCpq = _patches(img, patch, torch.where(counts_BR, hidden, 0))
    else:
        counts_BR, tiles_BRCpq = hidden_map(hidden, pred.shape[1]), _patches(img, patch, None)
    target_BRCpq = normalize(tiles_BRCpq, mean, std, wide).to(wide)
    target_BRD = (target_BRCpq if order == "cpq" else target_BRCpq.movedim(2, -1)).flatten(2)
    if norm:
        var_BR1, mean_BR1 = torch.var_mean(target_BRD, dim=-1, keepdim=True)
        target_BRD = (target_BRD - mean_BR1) / (var_BR1 + eps).sqrt()
    return _losses.mean_loss(pred, target_BRD, counts_BR[..., None], kind, beta)


def pixel_loss(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, norm: bool = True, kind: Kind = "mse",
    order: Order = "pqc", mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, eps: float = 1e-6,
    beta: float = 1.0, checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Score predicted pixels against the image, over the hidden patches only.

    Args:
        pred: (B, L, D), row l predicting patch l, or compact: (B, M, D) beside (B, M) indices, row m predicting patch
            hidden[b, m]. As many rows as indices always mean compact. float32, bfloat16 or float16 (float64 runs
            `ref`); values in the given order; any strides.
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides. H and W
            are multiples of `patch`, and L = H/patch * W/patch.
        hidden: (B, L) bool, True = hidden; or (B, M) int64, distinct indices of the hidden patches in any order. One
            outside 0..L-1 counts for nothing, so that images with fewer hidden patches can be filled up with -1.
        patch: side of a patch in pixels; D = patch * patch * 3.
        norm: compare with (t - mean) / sqrt(var + eps) of each patch instead of t.
        kind: f in the formula above.
        order: of the values in a row: "pqc", colour fastest (MAE), or "cpq", colour slowest (SimMIM).
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
    _check(pred, img, hidden, patch, kind, order, beta)
    if checked:
        _losses.check_named("pixel_loss", hidden, (img.shape[2] // patch) * (img.shape[3] // patch))
    chosen = resolve("pixel_loss", impl, IMPLS, partial(_why_not, pred, img, patch))
    if chosen == "ref":
        return pixel_loss_ref(
            pred, img, hidden, patch=patch, norm=norm, kind=kind, order=order, mean=mean, std=std, eps=eps, beta=beta
        )
    if not compact(pred, hidden):
        hidden = hidden_map(hidden, pred.shape[1])
    config = (patch, norm, kind, order, [*mean], [*std], eps, beta)
    return _losses.fused("pixel_loss", pred, img, hidden, config, chosen)


def _check(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, kind: str, order: str, beta: float) -> None:
    op = "pixel_loss"
    _losses.check_tail(op, pred, img, hidden, kind, beta)
    if patch < 1:
        fail(op, "patch", patch, "1 or more", "it is the side of a patch in pixels")
    if order not in ORDERS:
        fail(op, "order", repr(order), " or ".join(map(repr, ORDERS)), "a row has its colours last or first")
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
    check_shape(op, "pred", pred, (B, hidden.shape[1] if compact(pred, hidden) else L, D), because)


def _why_not(pred: Tensor, img: Tensor, patch: int, impl: str) -> str | None:
    if impl == "triton" and patch > 32:
        return f"the kernel keeps a patch in registers, which suits sides up to 32, not {patch}"
    return _losses.why_not_given(impl, pred, img) or why_not_on(impl, pred.device.type)


def _patches(img_BCHW: Tensor, patch: int, index_BR: Tensor | None) -> Tensor:
    """(B, R, C, p, q), all patches or those of valid indices; no other pixel is read."""
    B, C, H, W = img_BCHW.shape
    tiles = img_BCHW.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    if index_BR is None:
        return tiles.flatten(1, 2)
    b_B1, cols = torch.arange(B, device=index_BR.device)[:, None], W // patch
    return tiles[b_B1, index_BR // cols, index_BR % cols]


def _fwd(*args):
    if args[-1] == "triton":
        from mimfast.kernels.pixel_loss import pixel_loss_fwd

        return pixel_loss_fwd(*args[:-1])
    loss, d_pred, count = _losses.outputs(args[0], args[-2])
    _run_cpu(args[:-2], 1.0, loss, d_pred if args[-2] else None)
    return loss, d_pred, count.zero_()  # the native backward does not read it, counting again takes no time


def _bwd(*args):
    if args[-1] == "triton":
        from mimfast.kernels.pixel_loss import pixel_loss_bwd

        return pixel_loss_bwd(*args[:-1])
    d_pred, pred, img, hidden, _, upstream, *config, stale, _ = args
    if stale or upstream != 1:
        _run_cpu((pred, img, hidden, *config), upstream, None, d_pred)


def _run_cpu(inputs, upstream, loss, d_pred):
    pred, img, hidden, patch, norm, kind, order, mean, std, eps, beta = inputs
    core = _native.core()
    assert core is not None  # or `resolve` would have refused
    pred, hidden = pred if pred.stride(-1) == 1 else pred.contiguous(), hidden.contiguous()
    img = img if img.dtype == torch.uint8 else img.float()
    grid = img.shape[2] // patch, img.shape[3] // patch
    call = core.PixelLoss(
        rows=_losses.native_rows(core, pred, hidden, grid[0] * grid[1], kind, beta, upstream, loss, d_pred),
        img=img.data_ptr(), img_uint8=img.dtype == torch.uint8, img_stride=img.stride(), grid_cols=grid[1],
        patch=patch, norm=norm, colour_major=order == "cpq", mean=mean, std=std, eps=eps,
    )  # fmt: skip
    core.pixel_loss_cpu(call, torch.get_num_threads())


_CONFIG = "int patch, bool norm, str kind, str order, float[] mean, float[] std, float eps, float beta"
_losses.define("pixel_loss", _CONFIG, _fwd, _bwd)
