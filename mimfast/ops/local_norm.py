"""Every pixel standardised by the box around it, colour by colour: the target of SimMIM with SwinV2, arXiv:2111.09883.

x: the normalised image; m, v: mean and unbiased variance of x over the pixels of the window x window box around a pixel
that lie inside the image, v = (E[x^2] - m^2) n / (n - 1) with their number n, and 0 where n is 1.
out = (x - m) / sqrt(v + eps)
The authors' code takes E by average pooling in floating point, where E[x^2] - m^2 loses half its digits in flat parts
of an image; here sums are exact for uint8 images and double otherwise.
B batch, C = 3 channels, H W pixels
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("cuda", "cpu", "ref")
MAX_BOX_UINT8 = 255  # kLocalNormMaxBoxUint8 and kLocalNormMaxWidthCuda of csrc/local_norm.h
MAX_WIDTH_CUDA = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def local_norm_ref(
    img: Tensor, window: int = 47, *, eps: float = 1e-6, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
) -> Tensor:
    x_BCHW = normalize(img, mean, std, torch.float64).double()
    m_BCHW, squares_BCHW = _box_mean(x_BCHW, window), _box_mean(x_BCHW.square(), window)
    rows, cols = (_bounds(size, window, img.device) for size in img.shape[2:])
    n_HW = (rows[1] - rows[0])[:, None] * (cols[1] - cols[0])
    v_BCHW = (squares_BCHW - m_BCHW.square()).clamp(min=0) * n_HW / (n_HW - 1).clamp(min=1)
    return ((x_BCHW - m_BCHW) / (v_BCHW + eps).sqrt()).to(_result_dtype(img)).contiguous()


def local_norm(
    img: Tensor, window: int = 47, *, eps: float = 1e-6, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
    impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Standardise every pixel by mean and variance of the box around it. No gradient for `img`, except with impl="ref".

    The time does not depend on the window.

    Args:
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides. A value
            that is not finite spoils the rest of its plane.
        window: side of the box in pixels, odd; may be larger than the image.
        eps: added to the variance, > 0: what a flat part of an image is divided by.
        mean: per channel, of values in 0..1; for uint8 images, where it cancels.
        std: per channel, of values in 0..1, > 0; for uint8 images.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        (B, 3, H, W) float32 (float64 for float64 images), contiguous.
    Raises:
        UserError: an argument that does not fit, or an implementation that cannot take this call.
    """
    _check(img, window, eps, std)
    chosen = resolve("local_norm", impl, IMPLS, partial(_why_not, img, window))
    if chosen == "ref":
        return local_norm_ref(img, window, eps=eps, mean=mean, std=std)
    return torch.ops.mimfast.local_norm(img.detach(), window, eps, [*std], chosen)


def _bounds(size: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First index and the one behind the last of each box along one side, (size,) int64."""
    at = torch.arange(size, device=device)
    return (at - window // 2).clamp(min=0), (at + window // 2 + 1).clamp(max=size)


def _box_mean(x: Tensor, window: int) -> Tensor:
    for dim, pad in ((-1, (1, 0)), (-2, (0, 0, 1, 0))):
        first, end = _bounds(x.shape[dim], window, x.device)
        run = F.pad(x.cumsum(dim), pad)
        count = (end - first).to(x.dtype)
        x = (run.index_select(dim, end) - run.index_select(dim, first)) / (count if dim == -1 else count[:, None])
    return x


def _check(img: Tensor, window: int, eps: float, std: Triple) -> None:
    op = "local_norm"
    check_dtype(op, "img", img, (torch.uint8, *FLOATS), "it holds pixels")
    check_shape(op, "img", img, (None, 3, None, None), "an image batch is (B, 3, H, W)")
    if img.shape[2] * img.shape[3] == 0:
        fail(op, "img", f"{img.shape[2]} x {img.shape[3]} pixels", "1 x 1 or more", "a box has its own pixel at least")
    if window < 1 or window % 2 == 0:
        fail(op, "window", window, "an odd number of pixels", "the box has a pixel in its middle")
    if not eps > 0:
        fail(op, "eps", eps, "a number above 0", "flat parts of an image have no variance to divide by")
    if not min(std) > 0:
        fail(op, "std", tuple(std), "three numbers above 0", "pixels are divided by them")


def _why_not(img: Tensor, window: int, impl: str) -> str | None:
    if img.dtype == torch.float64:
        return "it computes the last step in float32 and was given float64"
    if img.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for img; detach the image, or use 'ref' where the gradient is needed"
    if img.dtype == torch.uint8 and min(window, 2 * max(img.shape[2:]) - 1) > MAX_BOX_UINT8:
        return f"sums of squares are kept in 32 bits, which suits windows up to {MAX_BOX_UINT8}, not {window}"
    if impl == "cuda" and img.shape[3] > MAX_WIDTH_CUDA:
        return f"the kernel keeps a row in shared memory, which suits {MAX_WIDTH_CUDA} pixels, not {img.shape[3]}"
    return why_not_on(impl, img.device.type)


def _result_dtype(img: Tensor) -> torch.dtype:
    return torch.float64 if img.dtype == torch.float64 else torch.float32


# contract: one schema and one fake; images have no gradient here, so there is no autograd
torch.library.define("mimfast::local_norm", "(Tensor img, int window, float eps, float[] std, str impl) -> Tensor")


@torch.library.register_fake("mimfast::local_norm")
def _allocate(img, window, eps, std, impl):  # noqa: ARG001
    return torch.empty(img.shape, dtype=torch.float32, device=img.device)


@torch.library.impl("mimfast::local_norm", ("cpu", "cuda"))
def _run(img, window, eps, std, impl):
    out = _allocate(img, window, eps, std, impl)
    run_native(_native.core(), impl, img, window, eps, std, out)
    return out


def run_native(core, impl: str, img: Tensor, window: int, eps: float, std: list[float], out: Tensor) -> None:
    """Fill `out` with mimfast._core, or the emulated core in tests."""
    raw = img.dtype == torch.uint8
    img = img if raw else img.float()
    height, width = img.shape[2:]
    call = core.LocalNorm(
        img=img.data_ptr(), img_uint8=raw, stride=img.stride(), batch=img.shape[0], height=height, width=width,
        radius=min(window // 2, max(height, width) - 1), floor=[eps * (255 * s) ** 2 if raw else eps for s in std],
        out=out.data_ptr(),
    )  # fmt: skip
    _masks.launch(core, "local_norm", impl, call, img.device)
