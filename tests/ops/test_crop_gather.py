"""crop_gather: the bits of crop_resize and then patch_gather, what it reads and writes, the contract, messages."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import UserError
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD
from mimfast.ops.crop_gather import IMPLS, crop_gather, run_native
from mimfast.ops.crop_resize import check_call
from mimfast.testing import crop_resize as crops
from mimfast.testing import emulated, poisoned, skip_unless
from mimfast.testing.crop_gather import CASES, Case, composed, make

SMALL = Case(crops.Case(3, 37, 29, 24), 8, kept=0.5)
WAYS = ["emulated", *IMPLS]


def run(impl: str, **args) -> Tensor:
    """crop_gather, also by the emulated CUDA kernel."""
    if impl != "emulated":
        return crop_gather(**args, impl=impl)
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    defaults = {"offsets": None, "shapes": None, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "order": "pqc"}
    args = defaults | {"filter": "bicubic", "dtype": torch.float32} | args
    boxes, flip, size, keep, patch = (args[n] for n in ("boxes", "flip", "size", "keep", "patch"))
    tensors = (args["offsets"], args["shapes"])
    img = check_call("crop_gather", args["img"], boxes, flip, size, args["filter"], *tensors)
    out = torch.full((*keep.shape, 3 * patch**2), torch.nan, dtype=args["dtype"])
    values = ([*args["mean"]], [*args["std"]], args["order"], args["filter"] == "bicubic")
    run_native(emulated.core(), "cuda", img, boxes, flip, size, keep, patch, *values, *tensors, out)
    return out


@pytest.fixture
def on(device):
    """The device an implementation runs on, or a skip."""

    def where(impl: str) -> str:
        if impl == "emulated":
            return "cpu"
        skip_unless(impl, device)
        return device

    return where


def on_cpu(args: dict) -> dict:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in args.items()}


@pytest.mark.parametrize("impl", [w for w in WAYS if w != "ref"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_crop_then_gather(case, impl, on):
    args = make(case, on(impl))
    with poisoned():
        got = run(impl, **args)
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), composed(**on_cpu(args), impl="ref"))
    if impl == "cpu":
        assert torch.equal(got, composed(**args, impl="cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ref_is_the_composition(case, device):
    args = make(case, device)
    assert torch.equal(crop_gather(**args, impl="ref"), composed(**args, impl="ref"))


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("order", ["pqc", "cpq"])
def test_every_instruction_set(order, bits):
    skip_unless("cpu", "cpu")
    core = _native.core()
    try:
        core.crop_resize_simd_bits(bits)
        for case in (SMALL, SMALL._replace(patch=3), SMALL._replace(crop=crops.Case(2, 60, 90, 46), patch=23)):
            args = make(case._replace(order=order))
            assert torch.equal(crop_gather(**args, impl="cpu"), composed(**args, impl="ref"))
    finally:
        core.crop_resize_simd_bits(512)


@pytest.mark.parametrize("std", [(1.0, 1e-3, 77.7), (1e-30, 3e38, 1e-44), (2**-126, 2**-127, 0.2)], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_any_mean_and_deviation(impl, std, on):
    """Quotients of fp32 to the last bit, tiny and huge ones too: 256 grey pixels become all values there are."""
    img = torch.arange(256).byte().view(256, 1, 1, 1).expand(-1, 3, 16, 16)
    boxes, keep = torch.tensor([[0, 0, 16, 16]] * 256).int(), torch.zeros(256, 1, dtype=torch.int64)
    args = {"boxes": boxes, "flip": None, "size": 16, "keep": keep, "patch": 16, "mean": (0.0, 0.4, -1e9), "std": std}
    device = on(impl)
    got = run(impl, img=img.to(device), **args | {"boxes": boxes.to(device), "keep": keep.to(device)})
    if impl != "ref" or device == "cpu":
        torch.testing.assert_close(got.cpu(), composed(img, **args, impl="ref"), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", WAYS)
def test_flip_mirrors_before_patches_are_counted(impl, on):
    args = make(SMALL._replace(kept=1.0), on(impl))
    plain, mirrored = (run(impl, **args | {"flip": torch.full_like(args["flip"], f)}) for f in (False, True))
    grid = plain.view(3, 3, 3, 8, 8, 3)
    assert torch.equal(grid.flip(2, 4).reshape(3, 9, -1), mirrored)
    assert torch.equal(run(impl, **args | {"flip": None}), plain)


@pytest.mark.parametrize("impl", WAYS)
def test_sees_only_what_kept_patches_need(impl, on):
    """A box of the size of the square is copied, so a patch is its own pixels."""
    img = crops.smooth(2, 48, 48).to(on(impl))
    boxes = torch.tensor([[0, 0, 48, 48]] * 2, dtype=torch.int32, device=img.device)
    keep = torch.tensor([[0, 4], [5, 8]], device=img.device)
    args = {"boxes": boxes, "flip": None, "size": 48, "keep": keep, "patch": 16}
    before, loud = run(impl, img=img, **args), torch.full_like(img, 255)
    for b, kept in enumerate(keep.tolist()):
        for y, x in (divmod(k, 3) for k in kept):
            at = (b, slice(None), slice(16 * y, 16 * y + 16), slice(16 * x, 16 * x + 16))
            loud[at] = img[at]
    assert torch.equal(run(impl, img=loud, **args), before)


@pytest.mark.parametrize("impl", WAYS)
def test_rows_are_those_of_each_patch_alone(impl, on):
    args = make(SMALL._replace(kept=1.5), on(impl))
    together = run(impl, **args)
    for k in range(args["keep"].shape[1]):
        assert torch.equal(run(impl, **args | {"keep": args["keep"][:, k : k + 1]}), together[:, k : k + 1])


@pytest.mark.parametrize("impl", WAYS)
def test_an_image_outside_its_buffer_is_black(impl, on):
    device = on(impl)
    buffer = torch.full((3 * 4 * 5,), 200, dtype=torch.uint8, device=device)
    args = {"img": buffer, "boxes": torch.tensor([[0, 0, 4, 5]] * 3).int().to(device), "flip": None, "size": 4}
    args |= {"offsets": torch.tensor([0, 1, 2**62], device=device), "mean": (0.0, 0.5, 1.0), "std": (1.0, 1.0, 1.0)}
    args |= {"shapes": torch.tensor([[4, 5]] * 3).int().to(device), "patch": 2}
    got = run(impl, keep=torch.tensor([[0, 9]] * 3, device=device), **args)
    assert (got[:, 1] == 0).all()
    assert (got[0, 0] > 200 / 255 - 1.01).all()
    assert torch.equal(got[1:, 0].cpu(), torch.tensor([0.0, -0.5, -1.0]).repeat(2, 4))


def test_threads_change_nothing():
    skip_unless("cpu", "cpu")
    args, before, found = make(SMALL), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(crop_gather(**args, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("impl", WAYS)
def test_nothing_kept_gives_nothing(impl, on):
    args = make(SMALL, on(impl))
    if impl != "emulated":  # the front sees to it
        assert run(impl, **args | {"keep": args["keep"][:, :0]}).shape == (3, 0, 192)


def test_double_precision_is_for_the_reference():
    args = make(SMALL) | {"dtype": torch.float64}
    assert crop_gather(**args).dtype == torch.float64
    with pytest.raises(UserError, match=r"impl has 'cpu', expected .* because it computes in float32"):
        crop_gather(**args, impl="cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["nchw", "packed"])
def test_contract(layout, impl, device):
    skip_unless(impl, device)
    a = make(SMALL._replace(crop=SMALL.crop._replace(layout=layout)), device)
    rows = (24, a["keep"], 8, [*IMAGENET_MEAN], [*IMAGENET_STD], "pqc", True)
    args = (a["img"], a["boxes"], a["flip"], *rows, a.get("offsets"), a.get("shapes"), torch.float32, impl)
    torch.library.opcheck(torch.ops.mimfast.crop_gather, args)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("layout", ["nhwc", "packed"])
def test_compiles_without_a_graph_break(layout, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(crop=SMALL.crop._replace(layout=layout)), device)
    torch._dynamo.reset()  # each choice of arguments is a compilation of its own, and there is a limit
    compiled = torch.compile(partial(crop_gather, impl=impl), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**args), crop_gather(**args, impl=impl))


IMG, BOXES = torch.zeros(2, 9, 8, 3, dtype=torch.uint8), torch.tensor([[0, 0, 9, 8], [1, 2, 3, 4]], dtype=torch.int32)
GOOD = {"img": IMG, "boxes": BOXES, "flip": None, "size": 4, "keep": torch.tensor([[0, 3], [1, 2]]), "patch": 2}
BAD = [
    ({"img": IMG.float()}, r"img has dtype float32, expected uint8 because it holds 8-bit pixels"),
    ({"img": IMG[:1]}, r"img has 1 images, expected 2 because there are 2 boxes"),
    ({"boxes": BOXES.long()}, r"boxes has dtype int64, expected int32"),
    ({"flip": torch.zeros(3, dtype=torch.bool)}, r"flip has shape \(3,\), expected \(2\) because there are 2 boxes"),
    ({"size": 65538}, r"size has 65538, expected 1 to 65536"),
    ({"filter": "nearest"}, r"filter has 'nearest', expected 'bilinear' or 'bicubic' because"),
    ({"shapes": torch.ones(2, 2).int()}, r"offsets has None, expected a tensor because a buffer needs"),
    ({"keep": GOOD["keep"].int()}, r"keep has dtype int32, expected int64 because it holds indices of patches"),
    ({"keep": GOOD["keep"][0]}, r"keep has shape \(2,\), expected \(2, any\) because .* each of the 2 boxes"),
    ({"patch": 3}, r"patch has 3, expected a divisor of 4 because the square has 4 x 4 pixels and no patch is cut"),
    ({"patch": 0}, r"patch has 0, expected a divisor of 4"),
    ({"std": (1.0, 0.0, 1.0)}, r"std has \(1.0, 0.0, 1.0\), expected three numbers above 0"),
    ({"order": "qpc"}, r"order has 'qpc', expected 'cpq' or 'pqc' because a row has its channels"),
    ({"dtype": torch.uint8}, r"dtype has uint8, expected a floating-point type because normalised"),
    ({"impl": "triton"}, r"impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref' because"),
]
OUTSIDE = [
    ({"boxes": BOXES + 1}, r"boxes has top 1, left 1, height 10, width 9 for image 0, expected a box inside the image"),
    ({"keep": GOOD["keep"] + 1}, r"keep has index 4 in row 0, expected 0 to 3 because a square has 4 patches"),
    ({"keep": GOOD["keep"] * 0}, r"keep has index 0 twice in row 0, expected distinct indices because"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="crop_gather: " + message):
        crop_gather(**GOOD | change)


@pytest.mark.parametrize(("change", "message"), OUTSIDE, ids=[m[:24] for _, m in OUTSIDE])
def test_says_what_is_outside_when_asked_to_look(change, message):
    crop_gather(**GOOD, checked=True)
    with pytest.raises(UserError, match="crop_gather: " + message):
        crop_gather(**GOOD | change, checked=True)
    assert crop_gather(**GOOD | change).shape == (2, 2, 12)
