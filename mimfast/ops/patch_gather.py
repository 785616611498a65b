"""The visible patches of an image batch as rows of the patch embedding's matrix product: normalise, gather, flatten.

row k of image b = 3 p p values of patch keep[b, k], uint8 x as (x / 255 - mean_c) / std_c. Hidden pixels are not read.
MAE, arXiv:2111.06377, section 3, whose code embeds every patch and gathers afterwards; a strided convolution with
kernel = stride = p is this operand times weight.flatten(1), in "cpq" order.
B batch, C = 3 channels, H W pixels, L patches in row-major order, K kept patches per image, p q rows and columns of a
patch, D = 3 p q values of a row; packed: T = rows of all images together
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("triton", "cpu", "ref")
ORDERS = ("cpq", "pqc")
Order = Literal["cpq", "pqc"]
MAX_ROWS_TRITON = 2**31 - 2**10  # its last program may start a few rows before the end and count beyond it
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_gather_ref(
    img: Tensor, keep: Tensor | None = None, *, patch: int, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
    order: Order = "cpq", flip: Tensor | None = None, cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    B, L, cols = img.shape[0], (img.shape[2] // patch) * (img.shape[3] // patch), img.shape[3] // patch
    dtype = _result_dtype(img, dtype)
    if flip is not None:
        img = torch.where(flip.view(-1, 1, 1, 1), img.flip(-1), img)
    tiles = img.unfold(2, patch, patch).unfold(3, patch, patch)  # a view, (B, C, rows, cols, p, q)
    if keep is None:
        keep = torch.arange(L, device=img.device).expand(B, L)
    if cu_seqlens is None:
        image = torch.arange(B, device=img.device)[:, None].expand_as(keep)
    else:
        image = image_of_rows(cu_seqlens, len(keep))
    fits = (keep >= 0) & (keep < L) & (image >= 0) & (image < B)
    image, patch_of = (torch.where(fits, index, 0) for index in (image, keep))
    chosen = tiles.permute(0, 2, 3, 1, 4, 5)[image, patch_of // cols, patch_of % cols]  # (..., C, p, q)
    values = normalize(chosen, mean, std, torch.promote_types(dtype, torch.float32))
    values = torch.where(fits[..., None, None, None], values, 0)
    return (values if order == "cpq" else values.movedim(-3, -1)).flatten(-3).to(dtype)


def patch_gather(
    img: Tensor, keep: Tensor | None = None, *, patch: int, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD,
    order: Order = "cpq", flip: Tensor | None = None, cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None, checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Cut the kept patches out of the images and lay them out as rows. No gradient for `img`, except with impl="ref".

    Args:
        img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides, so NCHW,
            channels_last and a permuted (B, H, W, 3) alike. H and W are multiples of `patch`.
        keep: (B, K) int64, indices below L = H/patch * W/patch; None stands for all patches in order. With `cu_seqlens`
            (T,), the rows of all images one after the other.
        patch: side of a patch in pixels.
        mean: per channel, of values in 0..1; for uint8 images.
        std: per channel, of values in 0..1; for uint8 images.
        order: of the values in a row: "cpq" as a convolution's weight has them, "pqc" as MAE's pixel targets have them.
        flip: (B,) bool, True = patches are those of the horizontally flipped image. None flips none.
        cu_seqlens: (B + 1,) int32, ascending from 0 to T: image b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        dtype: of the result; by default float32 for uint8 images and the dtype of `img` for others.
        checked: read the indices back and raise on a bad one; waits for the device, and torch.compile cannot trace it.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        (B, K, 3 * patch * patch), or (T, 3 * patch * patch) when packed. The row of an index outside 0..L-1 is zeros.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also an index out of range or given twice for one image, and cu_seqlens that do not tile the rows.
    """
    _check(img, keep, patch, std, order, flip, cu_seqlens, dtype)
    if checked and keep is not None:
        _check_indices(img, keep, patch, cu_seqlens)
    dtype = _result_dtype(img, dtype)
    chosen = resolve("patch_gather", impl, IMPLS, partial(_why_not, img, keep, patch, dtype))
    if chosen == "ref":
        return patch_gather_ref(
            img, keep, patch=patch, mean=mean, std=std, order=order, flip=flip, cu_seqlens=cu_seqlens, dtype=dtype
        )
    tensors = (img.detach(), keep, flip, cu_seqlens)
    return torch.ops.mimfast.patch_gather(*tensors, patch, [*mean], [*std], order, dtype, chosen)


def image_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The image that owns each packed row, (T,) int64; -1 or B for a row that none owns."""
    at_T = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, at_T, right=True) - 1


def _result_dtype(img: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return img.dtype if img.is_floating_point() else torch.float32


def _check(
    img: Tensor, keep: Tensor | None, patch: int, std: Triple, order: str, flip: Tensor | None,
    cu_seqlens: Tensor | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    op = "patch_gather"
    check_dtype(op, "img", img, (torch.uint8, *FLOATS), "it holds pixels")
    check_shape(op, "img", img, (None, 3, None, None), "an image batch is (B, 3, H, W)")
    if patch < 1:
        fail(op, "patch", patch, "1 or more", "it is the side of a patch in pixels")
    B, _, H, W = img.shape
    if H % patch or W % patch or H * W == 0:
        because = f"patches are {patch} x {patch} pixels and none may be cut"
        fail(op, "img", f"{H} x {W} pixels", f"multiples of {patch}", because)
    if order not in ORDERS:
        fail(op, "order", repr(order), " or ".join(map(repr, ORDERS)), "a row has its channels first or last")
    if dtype is not None and dtype not in FLOATS:
        fail(op, "dtype", str(dtype)[6:], "a floating-point type", "normalised pixels are fractions")
    if not min(std) > 0:
        fail(op, "std", tuple(std), "three numbers above 0", "pixels are divided by them")
    if flip is not None:
        check_dtype(op, "flip", flip, (torch.bool,), "an image is flipped or not")
        check_shape(op, "flip", flip, (B,), f"it holds one bool for each of the {B} images")
    if keep is not None:
        check_dtype(op, "keep", keep, (torch.int64,), "it holds indices of patches")
    if cu_seqlens is not None:
        check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,), "attention over packed rows takes it so")
        check_shape(op, "cu_seqlens", cu_seqlens, (B + 1,), f"it bounds the rows of {B} images")
        if keep is None:
            fail(op, "keep", "None", "(T,) indices", "cu_seqlens packs the indices of all images into one row")
        check_shape(op, "keep", keep, (None,), "cu_seqlens packs the indices of all images into one row")
        if B == 0 and len(keep) > 0:
            fail(op, "keep", f"{len(keep)} rows", "0", "there are 0 images to take them from")
    elif keep is not None:
        check_shape(op, "keep", keep, (B, None), f"it holds one row of indices for each of the {B} images")
    check_same_device(
        op, img=img, **{k: t for k, t in (("keep", keep), ("flip", flip), ("cu_seqlens", cu_seqlens)) if t is not None}
    )


def _check_indices(img: Tensor, keep: Tensor, patch: int, cu_seqlens: Tensor | None) -> None:
    op, L = "patch_gather", (img.shape[2] // patch) * (img.shape[3] // patch)
    image = torch.arange(len(img), device=keep.device)[:, None].expand_as(keep) if cu_seqlens is None else None
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != len(keep):
            fail(op, "cu_seqlens", bounds, f"ascending numbers from 0 to {len(keep)}", "they tile the rows of keep")
        image = image_of_rows(cu_seqlens, len(keep))
    bad = keep[(keep < 0) | (keep >= L)]
    if len(bad):
        fail(op, "keep", f"{len(bad)} indices like {int(bad[0])}", f"0..{L - 1}", f"an image has {L} patches")
    assert image is not None
    place, times = (image * L + keep).unique(return_counts=True)
    if len(place) < keep.numel():
        b, token = divmod(int(place[times > 1][0]), L)
        found = f"patch {token} of image {b} {int(times[times > 1][0])} times"
        fail(op, "keep", found, "distinct indices", "a patch is shown once")


def _why_not(img: Tensor, keep: Tensor | None, patch: int, dtype: torch.dtype, impl: str) -> str | None:
    if torch.float64 in (img.dtype, dtype):
        return "it computes in float32 and was asked for float64"
    if img.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for img; detach the image, or use 'ref' where the gradient is needed"
    rows = img.shape[0] * (img.shape[2] // patch) * (img.shape[3] // patch) if keep is None else keep.numel()
    if impl == "triton" and rows >= MAX_ROWS_TRITON:
        return f"the kernel counts rows in 32 bits and was given {rows}"
    return why_not_on(impl, img.device.type)


# contract: one schema and one fake; images have no gradient here, so there is no autograd
torch.library.define(
    "mimfast::patch_gather",
    "(Tensor img, Tensor? keep, Tensor? flip, Tensor? cu_seqlens, int patch, float[] mean, float[] std, str order, "
    "ScalarType dtype, str impl) -> Tensor",
)


@torch.library.register_fake("mimfast::patch_gather")
def _allocate(img, keep, flip, cu_seqlens, patch, mean, std, order, dtype, impl):  # noqa: ARG001
    rows = (img.shape[0], img.shape[2] // patch * (img.shape[3] // patch)) if keep is None else keep.shape
    return img.new_empty(*rows, 3 * patch * patch, dtype=dtype)


@torch.library.impl("mimfast::patch_gather", ("cpu", "cuda"))
def _run(img, keep, flip, cu_seqlens, patch, mean, std, order, dtype, impl):
    out = _allocate(img, keep, flip, cu_seqlens, patch, mean, std, order, dtype, impl)
    keep, flip, cu_seqlens = (None if t is None else t.contiguous() for t in (keep, flip, cu_seqlens))
    if impl == "triton":
        from mimfast.kernels.patch_gather import patch_gather as launch

        launch(img, keep, flip, cu_seqlens, patch, mean, std, order, out)
    else:
        _run_cpu(img, keep, flip, cu_seqlens, patch, mean, std, order, out)
    return out


def _run_cpu(img, keep, flip, cu_seqlens, patch, mean, std, order, out) -> None:
    core = _native.core()
    assert core is not None  # or `resolve` would have refused
    keep_at, flip_at, cu_at = (0 if t is None else t.data_ptr() for t in (keep, flip, cu_seqlens))
    call = core.PatchGather(
        img=img.data_ptr(), img_type=str(img.dtype)[6:], stride=img.stride(), batch=img.shape[0],
        grid_rows=img.shape[2] // patch, grid_cols=img.shape[3] // patch, patch=patch, keep=keep_at, flip=flip_at,
        cu_seqlens=cu_at, rows=out.numel() // (3 * patch * patch), channels_last=order == "pqc", mean=mean, std=std,
        out=out.data_ptr(), out_type=str(out.dtype)[6:],
    )  # fmt: skip
    core.patch_gather_cpu(call, torch.get_num_threads())
