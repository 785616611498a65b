"""Boxes of 8-bit images resampled with antialias to squares of 8-bit pixels, mirrored where asked: the random-resized-
crop of image pre-training for images that need no decoder, whatever their sizes.

Equal to cropping and then resizing as Pillow and torchvision v2 (antialias=True) do, but for the last bit of weights.
Along a side, `in` pixels to `out`: pixel x has its centre at c = (x + 1/2) in / out, source pixel j has the weight
f((j + 1/2 - c) / max(1, in / out)) over the sum of all inside the box; f(t) is 1 - |t| below 1 (bilinear), or Keys'
cubic convolution with a = -1/2 (1981, bicubic). First along the rows, rounded to 8 bits, then down the columns.

Every implementation gives the same bits: a weight is an integer in steps of 2^-15, computed from integer positions, the
difference of rounded running sums, so that weights add up to 1 exactly; sums of weights times pixels are exact.
B images, H W pixels, S side of the result, N bytes of a buffer with images one after the other
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("cuda", "cpu", "ref")
MAX_SIDE = 65536  # kCropMaxSide of csrc/crop_resize.h
Filter = Literal["bilinear", "bicubic"]
FILTERS: tuple[Filter, Filter] = ("bilinear", "bicubic")


def crop_resize_ref(img: Tensor, boxes: Tensor, flip: Tensor | None, size: int, *, filter: Filter) -> Tensor:
    """`crop_resize` of images of one shape, (B, 3, H, W): two dense products in float64, where they are exact."""
    (H, W), (top, left, height, width) = img.shape[2:], boxes.long().unbind(1)
    top, left = top.clamp(0, H - 1), left.clamp(0, W - 1)
    down_BSH = _weights(top, torch.minimum(height.clamp(min=1), H - top), H, size, filter == "bicubic")
    across_BSW = _weights(left, torch.minimum(width.clamp(min=1), W - left), W, size, filter == "bicubic")
    rows_BCHS = _round(torch.einsum("bchw,bsw->bchs", img.double(), across_BSW))
    out = _round(torch.einsum("bchs,bth->bcts", rows_BCHS, down_BSH)).to(torch.uint8)
    return out if flip is None else torch.where(flip[:, None, None, None], out.flip(3), out)


def crop_resize(
    img: Tensor, boxes: Tensor, flip: Tensor | None, size: int, *, filter: Filter = "bicubic",
    offsets: Tensor | None = None, shapes: Tensor | None = None, out: Tensor | None = None, checked: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Resample a box of each image to a square. No gradient.

    Args:
        img: (B, 3, H, W) or (B, H, W, 3) uint8 of one shape, any strides (3 on dimension 1 decides). With `offsets` and
            `shapes` (N,) uint8, contiguous: a buffer or a whole memory-mapped file in which images of any shapes lie,
            each (height, width, 3) without gaps.
        boxes: (B, 4) int32, top, left, height, width in source pixels. Pixels outside the box are not seen. A box is
            cut to the image, and has one pixel at least.
        flip: (B,) bool, mirror left and right; None: no image.
        size: S, 1 to 65536.
        filter: "bilinear" or "bicubic", both widened when the box is larger than the result.
        offsets: (B,) int64, the byte at which each image of a buffer begins.
        shapes: (B, 2) int32, height and width of each image of a buffer. An image that is not inside its buffer, or has
            a side outside 1..65536, gives zeros.
        out: (B, 3, S, S) uint8, contiguous, to be filled (pinned memory of a loader); None: a new one.
        checked: raise on a box or an image that is not inside; waits for the device, and torch.compile cannot trace it.
        impl: "auto", or one of IMPLS, which then runs or raises. "ref" of a buffer reads shapes back.
    Returns:
        (B, 3, S, S) uint8, contiguous: `out`, where it is given.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call; with
            `checked` also a box or an image that is not inside.
    """
    img = check_call("crop_resize", img, boxes, flip, size, filter, offsets, shapes)
    _check_out(img, boxes, size, out)
    if checked:
        check_inside("crop_resize", img, boxes, offsets, shapes)
    chosen = resolve("crop_resize", impl, IMPLS, partial(_why_not, img.device.type))
    out = img.new_empty(len(boxes), 3, size, size) if out is None else out
    torch.ops.mimfast.crop_resize(img, boxes, flip, filter == "bicubic", offsets, shapes, out, chosen)
    return out


def _weights(start_B: Tensor, length_B: Tensor, full: int, out: int, bicubic: bool) -> Tensor:
    """(B, out, full) float64 integers: weight * 2^15 of each source pixel, 0 outside the box."""
    at_J, x_S1 = torch.arange(full, device=start_B.device), torch.arange(out, device=start_B.device)[:, None]
    start, length = start_B[:, None, None], length_B[:, None, None]
    d = 2 * length.clamp(min=out)  # positions are numerators over it
    n = ((2 * (at_J - start) + 1) * out - (2 * x_S1 + 1) * length).abs()
    inside = (at_J >= start) & (at_J < start + length) & (n < (2 * d if bicubic else d))
    near, far = n * n * (3 * n - 5 * d) + 2 * d**3, n * n * (5 * d - n) - 8 * n * d * d + 4 * d**3
    value = torch.where(n < d, near, far) if bicubic else d - n
    share = (value.double() * (2.0**40 / (2 * d**3 if bicubic else d).double())).long()
    upto = torch.where(inside, share, 0).cumsum(2)
    steps = (upto.double() * (2.0**16 / upto[..., -1:].double())).long() + 1 >> 1
    return torch.diff(steps, dim=2, prepend=torch.zeros_like(steps[..., :1])).double()


def _round(sums: Tensor) -> Tensor:
    return ((sums + 2.0**14) / 2.0**15).floor().clamp(0, 255)


def check_call(op: str, img, boxes, flip, size, filter, offsets, shapes) -> Tensor:
    """Raise unless the arguments fit; the images as (B, 3, H, W), or the buffer."""
    B = len(boxes)
    check_dtype(op, "img", img, (torch.uint8,), "it holds 8-bit pixels")
    check_dtype(op, "boxes", boxes, (torch.int32,), "it holds pixel positions")
    check_shape(op, "boxes", boxes, (None, 4), "a box is top, left, height, width")
    if (offsets is None) != (shapes is None):
        fail(op, "shapes" if shapes is None else "offsets", None, "a tensor", "a buffer needs offsets and shapes")
    if offsets is None:
        img = _channels_first(op, img, B)
    else:
        check_shape(op, "img", img, (None,), "with offsets and shapes it is a flat buffer")
        check_dtype(op, "offsets", offsets, (torch.int64,), "it counts bytes")
        check_shape(op, "offsets", offsets, (B,), f"there are {B} boxes")
        check_dtype(op, "shapes", shapes, (torch.int32,), "it holds heights and widths")
        check_shape(op, "shapes", shapes, (B, 2), f"there are {B} boxes, and an image has height and width")
        if not img.is_contiguous():
            fail(op, "img", "gaps between its bytes", "a contiguous buffer", "offsets count bytes of memory")
    if flip is not None:
        check_dtype(op, "flip", flip, (torch.bool,), "it says yes or no for each image")
        check_shape(op, "flip", flip, (B,), f"there are {B} boxes")
    if not 1 <= size <= MAX_SIDE:
        fail(op, "size", size, f"1 to {MAX_SIDE}", "it is a side in pixels, and cubes of positions are kept in 64 bits")
    if filter not in FILTERS:
        fail(op, "filter", repr(filter), " or ".join(map(repr, FILTERS)), "no other filter is defined")
    given = {"boxes": boxes, "flip": flip, "offsets": offsets, "shapes": shapes}
    check_same_device(op, img=img, **{name: t for name, t in given.items() if t is not None})
    return img


def _check_out(img: Tensor, boxes: Tensor, size: int, out: Tensor | None) -> None:
    op, B = "crop_resize", len(boxes)
    if out is not None:
        check_dtype(op, "out", out, (torch.uint8,), "it receives 8-bit pixels")
        check_shape(op, "out", out, (B, 3, size, size), f"there are {B} boxes and the size is {size}")
        check_same_device(op, img=img, out=out)
        if not out.is_contiguous():
            fail(op, "out", "gaps between its pixels", "a contiguous tensor", "it is written as one block")


def _channels_first(op: str, img: Tensor, batch: int) -> Tensor:
    shape = tuple(img.shape)
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        fail(op, "img", f"shape {shape}", "(B, 3, H, W) or (B, H, W, 3)", "images have three colours")
    if shape[0] != batch:
        fail(op, "img", f"{shape[0]} images", batch, f"there are {batch} boxes")
    img = img if shape[1] == 3 else img.permute(0, 3, 1, 2)
    H, W = img.shape[2:]
    if not (1 <= H <= MAX_SIDE and 1 <= W <= MAX_SIDE):
        fail(op, "img", f"{H} x {W} pixels", f"sides from 1 to {MAX_SIDE}", "cubes of positions are kept in 64 bits")
    return img


def check_inside(op: str, img: Tensor, boxes: Tensor, offsets: Tensor | None, shapes: Tensor | None) -> None:
    """Raise on a box or an image that is not inside; waits for the device."""
    sizes = [list(img.shape[2:])] * len(boxes) if shapes is None else shapes.tolist()
    for b, from_byte in enumerate([] if offsets is None else offsets.tolist()):
        H, W = sizes[b]
        if not (1 <= H <= MAX_SIDE and 1 <= W <= MAX_SIDE):
            fail(op, "shapes", f"{H} x {W} for image {b}", f"sides from 1 to {MAX_SIDE}", "an image has pixels")
        if not 0 <= from_byte <= len(img) - 3 * H * W:
            because = f"{H} x {W} pixels are {3 * H * W} of the {len(img)} bytes of the buffer"
            fail(op, "offsets", f"{from_byte} for image {b}", f"0 to {len(img) - 3 * H * W}", because)
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        H, W = sizes[b]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > H or left + width > W:
            found = f"top {top}, left {left}, height {height}, width {width} for image {b}"
            fail(op, "boxes", found, "a box inside the image", f"image {b} has {H} x {W} pixels")


def _why_not(device: str, impl: str) -> str | None:
    return why_not_on(impl, device)


# contract: one schema that writes `out`, and a fake with nothing to say; 8-bit images have no gradient
torch.library.define(
    "mimfast::crop_resize",
    "(Tensor img, Tensor boxes, Tensor? flip, bool bicubic, Tensor? offsets, Tensor? shapes, Tensor(a!) out, "
    "str impl) -> ()",
)


@torch.library.register_fake("mimfast::crop_resize")
def _fake(img, boxes, flip, bicubic, offsets, shapes, out, impl):
    pass


@torch.library.impl("mimfast::crop_resize", ("cpu", "cuda"))
def _run(img, boxes, flip, bicubic, offsets, shapes, out, impl):
    if out.numel() == 0:
        return
    if impl != "ref":
        run_native(_native.core(), impl, img, boxes, flip, bicubic, offsets, shapes, out)
    elif offsets is None:
        out.copy_(crop_resize_ref(img, boxes, flip, out.shape[2], filter=FILTERS[bicubic]))
    else:
        for b, (start, (H, W)) in enumerate(zip(offsets.tolist(), shapes.tolist())):
            if min(H, W) >= 1 and max(H, W) <= MAX_SIDE and 0 <= start <= len(img) - 3 * H * W:
                one = img[start : start + 3 * H * W].view(1, H, W, 3).permute(0, 3, 1, 2)
                mirrored = None if flip is None else flip[b : b + 1]
                out[b] = crop_resize_ref(one, boxes[b : b + 1], mirrored, out.shape[2], filter=FILTERS[bicubic])[0]
            else:
                out[b] = 0


def run_native(core, impl, img, boxes, flip, bicubic, offsets, shapes, out) -> None:
    """Fill `out` with mimfast._core, or the emulated core in tests."""
    boxes, flip, offsets, shapes = (None if t is None else t.contiguous() for t in (boxes, flip, offsets, shapes))
    call = native_call(core, img, boxes, flip, out.shape[2], bicubic, offsets, shapes, out)
    _masks.launch(core, "crop_resize", impl, call, img.device)


def native_call(core, img, boxes, flip, size, bicubic, offsets, shapes, out):
    """core.CropResize of contiguous tensors, which the caller keeps alive."""
    packed = offsets is not None
    return core.CropResize(
        img=img.data_ptr(), stride=(0, 0, 0, 0) if packed else img.stride(), height=0 if packed else img.shape[2],
        width=0 if packed else img.shape[3], bytes=img.numel(), offsets=_masks.address(offsets),
        shapes=_masks.address(shapes), batch=len(boxes), boxes=boxes.data_ptr(), flip=_masks.address(flip),
        size=size, bicubic=bicubic, out=_masks.address(out),
    )  # fmt: skip
