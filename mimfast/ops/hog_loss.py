"""Loss of predicted against true histograms of oriented gradients of hidden tokens. FastMIM, arXiv:2212.06593, sec. 3.

target t of a token: what `hog` gives for its u x u cells, entry k*u*u + dy*u + dx, k = bins * colour + bin.
loss = mean over hidden tokens of the mean over D of f(pred - t), f(d) = d^2 | |d| | smooth_l1(d, beta).
Where the blocks of a mask are smaller than a token, `hidden` is a map of v x v parts of every token, and the mean is
over hidden parts and their entries.
No implementation but `ref` stores the target. B images, L tokens in row-major order, R rows of predictions per image,
L or in the compact layout M, u = patch/cell cells across a token, K = 3 * bins, D = K u u, H W pixels
"""

from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple
from mimfast.ops import _hog, _losses, _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._hog import Compat
from mimfast.ops._losses import Kind, compact, hidden_map
from mimfast.ops.hog import hog_ref

IMPLS = ("cuda", "cpu", "ref")


def hog_loss_ref(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, cell: int = 8, bins: int = 9, normalize: bool = True,
    kind: Kind = "mse", beta: float = 1.0, gaussian_window: int = 0, compat: Compat = "integer",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
) -> Tensor:  # fmt: skip
    L, u = (img.shape[2] // patch) * (img.shape[3] // patch), patch // cell
    rows = hidden if compact(pred, hidden) else None
    target_BRD = hog_ref(
        img, cell=cell, bins=bins, normalize=normalize, stride=patch, hidden=rows, gaussian_window=gaussian_window,
        compat=compat, mean=mean, std=std,
    )  # fmt: skip
    if rows is None and hidden.dtype == torch.bool:
        v, across = _parts(hidden, L, u), img.shape[3] // patch
        parts = hidden.view(-1, L // across, v, across, v).permute(0, 1, 3, 2, 4).reshape(-1, L, v, v)
        cells_BRuu = parts.repeat_interleave(u // v, 2).repeat_interleave(u // v, 3)
        counts_BRD = cells_BRuu.flatten(2).repeat(1, 1, target_BRD.shape[2] // u**2)
    else:
        counts_BR = hidden_map(hidden, L) if rows is None else (rows >= 0) & (rows < L)
        counts_BRD = counts_BR[..., None]
    wide = torch.promote_types(pred.dtype, torch.float32)
    return _losses.mean_loss(pred, target_BRD.to(wide), counts_BRD, kind, beta)


def hog_loss(
    pred: Tensor, img: Tensor, hidden: Tensor, *, patch: int, cell: int = 8, bins: int = 9, normalize: bool = True,
    kind: Kind = "mse", beta: float = 1.0, gaussian_window: int = 0, compat: Compat = "integer",
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Score predicted histograms against those of the image, over the hidden tokens only.

    Args:
        pred: (B, L, D), row l predicting token l, or compact: (B, M, D) beside (B, M) indices, row m predicting token
            hidden[b, m]. As many rows as indices always mean compact. float32, bfloat16 or float16 (float64 and float16
            run `ref`); entries in (k, dy, dx) order; any strides.
        img: (B, 3, H, W) uint8, any strides; compat="float" also takes floating point, normalised already. H and W are
            multiples of `patch`, and L = H/patch * W/patch.
        hidden: (B, L) bool, True = hidden; or (B, L*v*v) bool, row-major on a grid v times finer with cells of one or
            several HOG cells; or (B, M) int64, distinct indices of the hidden tokens in any order. One outside 0..L-1
            counts for nothing, so that images with fewer hidden tokens can be filled up with -1.
        patch: side of a token in pixels, a multiple of `cell`; D = 3 * bins * (patch / cell)^2.
        cell: side of a HOG cell in pixels.
        bins: bins over 180 degrees; other numbers than 9 with compat="float" only.
        normalize: compare with the histogram divided by its norm for each cell and colour, or with raw sums.
        kind: f in the formula above.
        beta: where smooth_l1 turns from square to linear, > 0.
        gaussian_window: side of the window of weights of `hog`, 0 for none.
        compat: "integer", or "float" for the arithmetic of the published layers (`ref` only).
        mean: per colour, of values in 0..1; for compat="float" and uint8 images.
        std: per colour, of values in 0..1; the scale of raw sums and, as `mean`, for compat="float".
        checked: read the indices back and raise on a bad one; waits for the device, and torch.compile cannot trace it.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        Scalar, float32 (float64 for float64 `pred`). Without anything hidden it is 0 and so is its gradient. The
        gradient of `pred` is 0 for what is visible, whatever it holds.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also an index outside 0..L-1 or given twice for one image.
    """
    _losses.check_tail("hog_loss", pred, img, hidden, kind, beta)
    _hog.check_rule("hog_loss", img, cell, bins, gaussian_window, compat, std)
    L = _check_rows(pred, img, hidden, patch, cell, bins)
    if checked:
        _losses.check_named("hog_loss", hidden, L)
    chosen = resolve("hog_loss", impl, IMPLS, partial(_why_not, pred, img, compat))
    if chosen == "ref":
        return hog_loss_ref(
            pred, img, hidden, patch=patch, cell=cell, bins=bins, normalize=normalize, kind=kind, beta=beta,
            gaussian_window=gaussian_window, compat=compat, mean=mean, std=std,
        )  # fmt: skip
    if not compact(pred, hidden):
        hidden = hidden_map(hidden, L)
    config = (patch, cell, normalize, kind, beta, gaussian_window, [*std])
    return _losses.fused("hog_loss", pred, img, hidden, config, chosen)


def _check_rows(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, cell: int, bins: int) -> int:
    op, (B, _, H, W) = "hog_loss", img.shape
    _hog.check_stride(op, img, cell, patch, "patch")
    L, u = (H // patch) * (W // patch), patch // cell
    D = 3 * bins * u * u
    because = f"{H}/{patch} x {W}/{patch} gives {L} tokens of {u} x {u} cells with 3 * {bins} values, {D} in all"
    if hidden.dtype == torch.int64:
        check_shape(op, "hidden", hidden, (B, None), because)
        rows = hidden.shape[1] if compact(pred, hidden) else L
        if rows == L:
            because += f", or to one row for each of the {hidden.shape[1]} indices"
        check_shape(op, "pred", pred, (B, rows, D), because)
        return L
    check_shape(op, "hidden", hidden, (B, None), because)
    if _parts(hidden, L, u) == 0:
        sizes = ", ".join(str(L * n * n) for n in range(1, u + 1) if u % n == 0)
        fail(op, "hidden", f"{hidden.shape[1]} entries for an image", f"one of {sizes}", because)
    check_shape(op, "pred", pred, (B, L, D), because)
    return L


def _parts(hidden: Tensor, L: int, u: int) -> int:
    """v of a bool map of the parts of L tokens; 0 when no v that divides u gives its size."""
    return next((v for v in range(1, u + 1) if u % v == 0 and L * v * v == hidden.shape[1]), 0)


def _why_not(pred: Tensor, img: Tensor, compat: str, impl: str) -> str | None:
    if compat == "float":
        return "the kernels compute with integer gradients, and compat='float' is the arithmetic of 'ref'"
    if pred.dtype == torch.float16:
        return "the native code takes float32 and bfloat16 predictions and was given float16"
    return _losses.why_not_given(impl, pred, img) or why_not_on(impl, pred.device.type)


def _fwd(*args):
    loss, d_pred, count = _losses.outputs(args[0], args[-2])
    if args[-1] == "cpu":
        run_native(_native.core(), "cpu", args[:-2], 1.0, loss, d_pred if args[-2] else None, None, True)
        return loss, d_pred, count.zero_()  # the native backward does not read it, counting again takes no time
    return run_gpu(_native.core(), args[:-2], args[-2])


def _bwd(*args):
    d_pred, pred, img, hidden, count, upstream, *config, stale, impl = args
    inputs = (pred, img, hidden, *config)
    if impl == "cuda":
        run_native(_native.core(), "cuda", inputs, upstream, None, d_pred, count, stale)
    elif stale or upstream != 1:
        run_native(_native.core(), "cpu", inputs, upstream, None, d_pred, None, stale)


def run_gpu(core, inputs, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and count by mimfast._core on a GPU, or by the emulated core in tests."""
    pred, img, hidden, patch, *_ = inputs
    count = _losses.count(hidden, (img.shape[2] // patch) * (img.shape[3] // patch))
    _, d_pred, _ = _losses.outputs(pred, grad)
    loss = run_native(core, "cuda", inputs, None, None, d_pred if grad else None, count, True)
    return loss.sum(), d_pred, count


def run_native(core, impl, inputs, upstream, loss, d_pred, count, stale) -> Tensor:
    """Run mimfast._core. On a GPU `upstream` is a tensor, or None for a forward, whose partial losses are returned."""
    pred, img, hidden, patch, cell, normalize, kind, beta, window, std = inputs
    H, W = img.shape[2:]
    L, gpu = (H // patch) * (W // patch), impl == "cuda"
    pred, hidden = pred if pred.stride(-1) == 1 else pred.contiguous(), hidden.contiguous()
    rows = _losses.native_rows(core, pred, hidden, L, kind, beta, 1.0 if gpu else float(upstream), loss, d_pred)
    images = _hog.native_images(core, img, cell, normalize, window, std)
    parts = 1 if hidden.dtype == torch.int64 else _parts(hidden, L, patch // cell)
    given = {"rows": rows, "images": images, "side": patch // cell, "parts": parts, "stale": stale}
    given |= {"count": _masks.address(count), "upstream": _masks.address(upstream if gpu else None)}
    blocks = core.hog_loss_partials(core.HogLoss(**given, partial=0)) if gpu and upstream is None else 0
    partial_losses = torch.empty(blocks, dtype=torch.float32, device=pred.device)
    call = core.HogLoss(**given, partial=partial_losses.data_ptr() if blocks else 0)
    _masks.launch(core, "hog_loss", impl, call, pred.device)
    return partial_losses


_CONFIG = "int patch, int cell, bool normalize, str kind, float beta, int window, float[] std"
_losses.define("hog_loss", _CONFIG, _fwd, _bwd)
