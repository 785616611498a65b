"""Histograms of oriented gradients, the targets of MaskFeat (arXiv:2112.09133) and FastMIM (arXiv:2212.06593).

gx = left - right and gy = top - bottom, Sobel with weights (1, 2, 1), each colour for itself, the image mirrored at its
border (no edge repeated); m = sqrt(gx^2 + gy^2); bin = floor(9 atan2(gx, gy) / pi) mod 9; the histogram of a cell sums
m over its pixels by bin, hard assignment; with `normalize` it is divided by its norm over the bins of a colour.

compat="integer", the default: the mean of a colour cancels in gx and gy and its std in the normalisation, so all of it
is computed from the 8-bit image, and to the same bits by every implementation, whatever the order of sums:
* The bin of an integer gradient needs no angle: with n = #{k = 1..4 : |gx| >= |gy| tan 20k} in fp32 it is n, or 8 - n
  where gx gy < 0. That is the exact rule for every integer gradient; gx = 0 is bin 0.
* m is a correctly rounded fp32 root cut to steps of 2^-14 (cell 8), to be summed as int32: up to 6e-5 too small.
* norm = sqrt(sum of h^2, an exact int64). Raw sums are multiplied by 1 / (255 std), to be those of normalised images.
compat="float": the layers of both papers as published, in fp32: float gradients of the normalised image in the written
order, atan2, floor, mod. A gx that is 0 but for rounding falls in bin 0 or 8 by chance there, so the two agree by RMS
(about .01 of the normalised values), not entry by entry.

B images, 3 colours, H W pixels, h = H/cell, w = W/cell, k = bins * colour + bin, K = 3 * bins, T tokens in row-major
order, u cells across a token, M rows of `hidden`, D = K u u
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast import _images, _native
from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple
from mimfast.ops import _hog, _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._hog import Compat

IMPLS = ("cuda", "triton", "cpu", "ref")


def hog_ref(
    img: Tensor, *, cell: int = 8, bins: int = 9, normalize: bool = True, stride: int | None = None,
    hidden: Tensor | None = None, gaussian_window: int = 0, compat: Compat = "integer", mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    integer, (H, W) = compat == "integer", img.shape[2:]
    x = F.pad((img if integer else _images.normalize(img.detach(), mean, std)).float(), (1, 1, 1, 1), mode="reflect")
    top, middle, bottom = x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]
    side = top + 2 * middle + bottom
    above, below = (r[..., :-2] + 2 * r[..., 1:-1] + r[..., 2:] for r in (top, bottom))
    gx, gy = side[..., :-2] - side[..., 2:], above - below
    unit, weights = _hog.fixed_point(cell, gaussian_window) if integer else (1.0, _hog.gaussian(gaussian_window))
    size = _root(gx * gx + gy * gy) * _weight(unit, weights, img)
    if integer:
        level = torch.stack([gx.abs() >= gy.abs() * t for t in _hog.TANGENTS]).sum(0)
        which, size = torch.where(gx * gy < 0, 8 - level, level), size.to(torch.int32)
    else:
        which = (torch.atan2(gx, gy) / math.pi * bins).floor() % bins
    grid = (-1, 3, H // cell, cell, W // cell, cell)
    hist_BCKhw = torch.stack([torch.where(which == k, size, 0).view(grid).sum((3, 5)) for k in range(bins)], 2)
    if normalize:
        norm_BC1hw = _root(hist_BCKhw.square().sum(2, keepdim=True).float())
        factor = 1 / norm_BC1hw.clamp(min=1 if integer else 1e-12)
    else:
        raw = [1 / (255 * s * unit) if integer else 1.0 for s in std]
        factor = _images.per_channel((raw[0], raw[1], raw[2]), img.device, torch.float32)[:, None]
    return _arrange((hist_BCKhw.float() * factor).flatten(1, 2), cell, stride, hidden).to(dtype)


def hog(
    img: Tensor, *, cell: int = 8, bins: int = 9, normalize: bool = True, stride: int | None = None,
    hidden: Tensor | None = None, gaussian_window: int = 0, compat: Compat = "integer", mean: Triple = IMAGENET_MEAN,
    std: Triple = IMAGENET_STD, dtype: torch.dtype = torch.float32, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Describe every cell of an image by its histogram of oriented gradients.

    Args:
        img: (B, 3, H, W) uint8, any strides. compat="float" also takes floating point, normalised already. H and W are
            multiples of `cell`. No gradient flows into it.
        cell: side of a cell in pixels, 2 or more.
        bins: bins over 180 degrees; other numbers than 9 with compat="float" only.
        normalize: divide by the norm of each cell and colour (MaskFeat; FastMIM with --norm_pix_loss); else raw sums.
        stride: side of a token in pixels, a multiple of `cell` that divides H and W. None: the dense layout.
        hidden: (B, M) int64, indices of the tokens that are wanted, in any order; needs `stride`. One outside 0..T-1
            gives a row of zeros. A bool map has no fixed number of rows and is refused: `mask_pack` makes indices of
            it, `hog_loss` takes it as it is.
        gaussian_window: 0 (none, as the papers' code has it; mmpretrain has 16), or the side, 2..32, of a window that
            divides H and W: weights exp(-((n - mean) / std)^2 / 2), std = side // 2, outer product, sum 1, tiled from
            the top left corner, times m.
        compat: "integer", or "float" for the arithmetic of the published layers (`ref` only).
        mean: per colour, of values in 0..1; for compat="float" and uint8 images.
        std: per colour, of values in 0..1; the scale of raw sums and, as `mean`, for compat="float".
        dtype: of the result, float32 or bfloat16.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        (B, K, h, w); with `stride` (B, T, D) with entry k*u*u + dy*u + dx for cell (dy, dx) of the token; with `hidden`
        (B, M, D). A flat cell is zeros. Raw sums are in units of the normalised image.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call.
    """
    _hog.check_rule("hog", img, cell, bins, gaussian_window, compat, std)
    _check(img, cell, stride, hidden, dtype)
    chosen = resolve("hog", impl, IMPLS, partial(_why_not, img.device.type, compat))
    if chosen == "ref":
        return hog_ref(
            img, cell=cell, bins=bins, normalize=normalize, stride=stride, hidden=hidden,
            gaussian_window=gaussian_window, compat=compat, mean=mean, std=std, dtype=dtype,
        )  # fmt: skip
    return torch.ops.mimfast.hog(img, hidden, cell, normalize, stride or 0, gaussian_window, [*std], dtype, chosen)


def _root(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # correctly rounded; fp32 roots of torch need not be (MKL)


def _weight(unit: float, side: list[float], img: Tensor) -> Tensor | float:
    if not side:
        return unit
    side_G = torch.stack([torch.full((), v, device=img.device) for v in side])  # a copy from the host breaks capture
    tall_H, wide_W = (side_G.repeat(n // len(side)) for n in img.shape[2:])
    return tall_H[:, None] * wide_W


def _arrange(dense_BKhw: Tensor, cell: int, stride: int | None, hidden: Tensor | None) -> Tensor:
    if stride is None:
        return dense_BKhw
    tiles = dense_BKhw.unflatten(3, (-1, stride // cell)).unflatten(2, (-1, stride // cell))
    rows_BTD = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    if hidden is None:
        return rows_BTD
    fits_BM1 = ((hidden >= 0) & (hidden < rows_BTD.shape[1]))[..., None]
    index_BMD = torch.where(fits_BM1, hidden[..., None], 0).expand(-1, -1, rows_BTD.shape[2])
    return torch.where(fits_BM1, rows_BTD.gather(1, index_BMD), 0.0)


def _check(img: Tensor, cell: int, stride: int | None, hidden: Tensor | None, dtype: torch.dtype) -> None:
    op = "hog"
    if dtype not in (torch.float32, torch.bfloat16):
        fail(op, "dtype", str(dtype)[6:], "float32 or bfloat16", "targets are compared with predictions of these types")
    if stride is not None:
        _hog.check_stride(op, img, cell, stride)
    if hidden is not None:
        if stride is None:
            fail(op, "stride", None, "the side of a token in pixels", "hidden names tokens")
        because = "rows are picked by index; mask_pack turns a bool map into indices"
        check_dtype(op, "hidden", hidden, (torch.int64,), because)
        check_shape(op, "hidden", hidden, (len(img), None), f"it holds one row for each of {len(img)} images")
        check_same_device(op, img=img, hidden=hidden)


def _why_not(device: str, compat: str, impl: str) -> str | None:
    if compat == "float":
        return "the kernels compute with integer gradients, and compat='float' is the arithmetic of 'ref'"
    return why_not_on(impl, device)


# contract: one schema and one fake; 8-bit images have no gradient, so there is no autograd. stride 0: the dense layout
torch.library.define(
    "mimfast::hog",
    "(Tensor img, Tensor? hidden, int cell, bool normalize, int stride, int window, float[] std, ScalarType dtype, "
    "str impl) -> Tensor",
)


@torch.library.register_fake("mimfast::hog")
def _allocate(img, hidden, cell, normalize, stride, window, std, dtype, impl):  # noqa: ARG001
    B, _, H, W = img.shape
    if stride == 0:
        return img.new_empty(B, 27, H // cell, W // cell, dtype=dtype)
    rows = (H // stride) * (W // stride) if hidden is None else hidden.shape[1]
    return img.new_empty(B, rows, 27 * (stride // cell) ** 2, dtype=dtype)


@torch.library.impl("mimfast::hog", ("cpu", "cuda"))
def _run(img, hidden, cell, normalize, stride, window, std, dtype, impl):
    out = _allocate(img, hidden, cell, normalize, stride, window, std, dtype, impl)
    if out.numel() == 0:
        return out
    hidden = None if hidden is None else hidden.contiguous()
    if impl == "triton":
        from mimfast.kernels.hog import hog as launch

        launch(img, hidden, cell, normalize, stride, *_hog.rule(cell, window, std), out)
    else:
        run_native(_native.core(), impl, img, hidden, cell, normalize, stride, window, std, out)
    return out


def run_native(core, impl, img, hidden, cell, normalize, stride, window, std, out) -> None:
    """Fill `out` with mimfast._core, or the emulated core in tests."""
    call = core.Hog(
        images=_hog.native_images(core, img, cell, normalize, window, std), side=stride // cell if stride else 1,
        dense=stride == 0, rows=out.shape[2] * out.shape[3] if stride == 0 else out.shape[1],
        index=_masks.address(hidden), out=out.data_ptr(), out_bf16=out.dtype == torch.bfloat16,
    )  # fmt: skip
    _masks.launch(core, "hog", impl, call, img.device)
