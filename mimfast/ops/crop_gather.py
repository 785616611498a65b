"""The visible patches of a random-resized-crop, from raw 8-bit images to normalised rows of the patch embedding.

Row k of image b = 3 p p values of patch keep[b, k] of the S x S square that `crop_resize` makes of its box, mirrored
where asked, 8-bit x as (x / 255 - mean_c) / std_c: patch_gather(crop_resize(img, ...), keep, ...) to the bit, with its
rounding to 8 bits in between, so that an 8-bit target made of the same box agrees with what the encoder saw. Only the
kept patches are resampled: source rows and columns that no kept patch reaches are not read. All kernels give the bits
of the reference on a CPU; on a GPU torch itself may divide with another last bit.
B images, H W pixels, S side of the square, L = (S / p)^2 patches in row-major order, K kept patches per image, p q rows
and columns of a patch, D = 3 p q values of a row, N bytes of a buffer with images one after the other
"""

from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_indices, check_same_device, check_shape, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops.crop_resize import FILTERS, Filter, check_call, check_inside, crop_resize, native_call
from mimfast.ops.patch_gather import FLOATS, ORDERS, Order, patch_gather_ref

IMPLS = ("cuda", "cpu", "ref")


def crop_gather_ref(
    img: Tensor, boxes: Tensor, flip: Tensor | None, size: int, keep: Tensor, patch: int, *,
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, order: Order = "pqc", filter: Filter = "bicubic",
    offsets: Tensor | None = None, shapes: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    square = crop_resize(img, boxes, flip, size, filter=filter, offsets=offsets, shapes=shapes, impl="ref")
    return patch_gather_ref(square, keep, patch=patch, mean=mean, std=std, order=order, dtype=dtype)


def crop_gather(
    img: Tensor, boxes: Tensor, flip: Tensor | None, size: int, keep: Tensor, patch: int, *,
    mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, order: Order = "pqc", filter: Filter = "bicubic",
    offsets: Tensor | None = None, shapes: Tensor | None = None, dtype: torch.dtype = torch.float32,
    checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Resample the kept patches of a box of each image and lay them out as normalised rows. No gradient.

    Args:
        img: (B, 3, H, W) or (B, H, W, 3) uint8 of one shape, any strides (3 on dimension 1 decides). With `offsets` and
            `shapes` (N,) uint8, contiguous: a buffer or a whole memory-mapped file in which images of any shapes lie,
            each (height, width, 3) without gaps.
        boxes: (B, 4) int32, top, left, height, width in source pixels. Pixels outside the box are not seen. A box is
            cut to the image, and has one pixel at least.
        flip: (B,) bool, mirror left and right, before patches are counted; None: no image.
        size: S, side of the square that a box becomes, a multiple of `patch`, at most 65536.
        keep: (B, K) int64, indices below L = (size / patch)^2.
        patch: side of a patch in pixels.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        order: of the values in a row: "pqc" as MAE's pixel targets have them, "cpq" as a convolution's weight has them.
        filter: "bilinear" or "bicubic", both widened when the box is larger than the square.
        offsets: (B,) int64, the byte at which each image of a buffer begins.
        shapes: (B, 2) int32, height and width of each image of a buffer. An image that is not inside its buffer, or has
            a side outside 1..65536, counts as black.
        dtype: of the result.
        checked: raise on a box or an image that is not inside, and on an index out of range or given twice; waits for
            the device, and torch.compile cannot trace it.
        impl: "auto", or one of IMPLS, which then runs or raises. "ref" of a buffer reads shapes back.
    Returns:
        (B, K, 3 * patch * patch) in `dtype`. The row of an index outside 0..L-1 is zeros.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also what it looks for.
    """
    img = check_call("crop_gather", img, boxes, flip, size, filter, offsets, shapes)
    _check_rows(img, boxes, size, keep, patch, std, order, dtype)
    if checked:
        check_inside("crop_gather", img, boxes, offsets, shapes)
        L = (size // patch) ** 2
        check_indices("crop_gather", "keep", keep, L, f"a square has {L} patches, and each is shown once")
    chosen = resolve("crop_gather", impl, IMPLS, partial(_why_not, img.device.type, dtype))
    tensors, values = (img, boxes, flip, size, keep, patch), ([*mean], [*std], order, filter == "bicubic")
    return torch.ops.mimfast.crop_gather(*tensors, *values, offsets, shapes, dtype, chosen)


def _check_rows(img: Tensor, boxes: Tensor, size: int, keep: Tensor, patch: int, std: Triple, order, dtype) -> None:
    op = "crop_gather"
    check_dtype(op, "keep", keep, (torch.int64,), "it holds indices of patches")
    check_shape(op, "keep", keep, (len(boxes), None), f"it holds one row of indices for each of the {len(boxes)} boxes")
    check_same_device(op, img=img, keep=keep)
    if patch < 1 or size % patch:
        fail(op, "patch", patch, f"a divisor of {size}", f"the square has {size} x {size} pixels and no patch is cut")
    if not min(std) > 0:
        fail(op, "std", tuple(std), "three numbers above 0", "pixels are divided by them")
    if order not in ORDERS:
        fail(op, "order", repr(order), " or ".join(map(repr, ORDERS)), "a row has its channels first or last")
    if dtype not in FLOATS:
        fail(op, "dtype", str(dtype)[6:], "a floating-point type", "normalised pixels are fractions")


def _why_not(device: str, dtype: torch.dtype, impl: str) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32 and was asked for float64"
    return why_not_on(impl, device)


# contract: one schema and one fake; 8-bit images have no gradient
torch.library.define(
    "mimfast::crop_gather",
    "(Tensor img, Tensor boxes, Tensor? flip, SymInt size, Tensor keep, int patch, float[] mean, float[] std, "
    "str order, bool bicubic, Tensor? offsets, Tensor? shapes, ScalarType dtype, str impl) -> Tensor",
)


@torch.library.register_fake("mimfast::crop_gather")
def _allocate(img, boxes, flip, size, keep, patch, mean, std, order, bicubic, offsets, shapes, dtype, impl):  # noqa: ARG001
    return img.new_empty(*keep.shape, 3 * patch * patch, dtype=dtype)


@torch.library.impl("mimfast::crop_gather", ("cpu", "cuda"))
def _run(img, boxes, flip, size, keep, patch, mean, std, order, bicubic, offsets, shapes, dtype, impl):
    tensors, values = (img, boxes, flip, size, keep, patch), (mean, std, order, bicubic, offsets, shapes, dtype)
    if impl == "ref":
        return crop_gather_ref(
            *tensors, mean=mean, std=std, order=order, filter=FILTERS[bicubic], offsets=offsets, shapes=shapes,
            dtype=dtype,
        )  # fmt: skip
    out = _allocate(*tensors, *values, impl)
    if out.numel():
        run_native(_native.core(), impl, *tensors, *values[:-1], out)
    return out


def run_native(
    core, impl, img, boxes, flip, size, keep, patch, mean, std, order, bicubic, offsets, shapes, out
) -> None:
    """Fill `out` with mimfast._core, or the emulated core in tests."""
    boxes, flip, keep = boxes.contiguous(), None if flip is None else flip.contiguous(), keep.contiguous()
    offsets, shapes = (None if t is None else t.contiguous() for t in (offsets, shapes))
    call = core.CropGather(
        crop=native_call(core, img, boxes, flip, size, bicubic, offsets, shapes, None), keep=keep.data_ptr(),
        kept=keep.shape[1], patch=patch, channels_last=order == "pqc", mean=mean, std=std, out=out.data_ptr(),
        out_type=str(out.dtype)[6:],
    )  # fmt: skip
    _masks.launch(core, "crop_gather", impl, call, img.device)
