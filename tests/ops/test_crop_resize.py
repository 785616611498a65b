"""crop_resize: the same bits everywhere, a grey level to Pillow and torchvision, the contract, properties, messages."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import UserError
from mimfast.ops.crop_resize import IMPLS, MAX_SIDE, _weights, check_call, crop_resize, run_native
from mimfast.testing import emulated, poisoned, skip_unless
from mimfast.testing.crop_resize import CASES, Case, make, pillow, smooth, torchvision

SMALL = Case(3, 37, 29, 18)
WAYS = ["emulated", *IMPLS]


def run(impl: str, **args) -> Tensor:
    """crop_resize, also by the emulated CUDA kernel."""
    if impl != "emulated":
        return crop_resize(**args, impl=impl)
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    args = {"offsets": None, "shapes": None} | args
    img = check_call("crop_resize", **args)
    out = torch.full((len(args["boxes"]), 3, args["size"], args["size"]), 77, dtype=torch.uint8)
    bicubic, tensors = args["filter"] == "bicubic", (args["offsets"], args["shapes"])
    run_native(emulated.core(), "cuda", img, args["boxes"], args["flip"], bicubic, *tensors, out)
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


@pytest.mark.parametrize("impl", [w for w in WAYS if w != "ref"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_reference(case, impl, on):
    args = make(case, on(impl))
    with poisoned():
        got = run(impl, **args)
    assert got.is_contiguous()
    assert got.dtype == torch.uint8
    assert torch.equal(got, crop_resize(**args, impl="ref"))


@pytest.mark.parametrize("peer", [pillow, torchvision], ids=["pillow", "torchvision"])
@pytest.mark.parametrize("case", [c for c in CASES if c.box != "wild"], ids=str)
def test_within_a_grey_level_of_what_people_use(case, peer):
    args = make(case)
    difference = (crop_resize(**args).int() - peer(args).int()).abs()
    if difference.numel():
        print(f"other pixels {(difference > 0).float().mean():.1%}, largest difference {difference.max()}")
        assert (difference > 1).float().mean() <= 1e-3
        assert (difference > 0).float().mean() <= 0.15  # Pillow may filter columns first


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("peer", [pillow, torchvision], ids=["pillow", "torchvision"])
def test_hard_edges_overshoot_alike(peer, filter):
    img = (torch.rand(2, 3, 75, 90) < 0.5).byte() * 255  # the cubic leaves 0..255 everywhere
    boxes = torch.tensor([[0, 0, 75, 90], [11, 20, 31, 27]], dtype=torch.int32)
    args = {"img": img, "boxes": boxes, "flip": torch.tensor([True, False]), "size": 40, "filter": filter}
    difference = (crop_resize(**args).int() - peer(args).int()).abs()
    assert (difference > 1).float().mean() <= 1e-3


@pytest.mark.parametrize("bits", [128, 256, 512])
def test_every_instruction_set(bits):
    skip_unless("cpu", "cpu")
    core = _native.core()
    try:
        core.crop_resize_simd_bits(bits)
        for case in (SMALL, SMALL._replace(filter="bilinear", layout="nchw", size=33)):
            args = make(case)
            assert torch.equal(crop_resize(**args, impl="cpu"), crop_resize(**args, impl="ref"))
    finally:
        core.crop_resize_simd_bits(512)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_one_colour_stays_itself(filter, impl, on):
    device = on(impl)
    boxes = torch.tensor([[0, 0, 120, 33], [5, 6, 7, 8]], dtype=torch.int32, device=device)
    for value in (0, 1, 128, 255):
        img = torch.full((2, 120, 33, 3), value, dtype=torch.uint8, device=device)
        assert (run(impl, img=img, boxes=boxes, flip=None, size=17, filter=filter) == value).all()


@pytest.mark.parametrize("impl", WAYS)
def test_flip_mirrors(impl, on):
    args = make(SMALL, on(impl))
    plain, mirrored = (run(impl, **args | {"flip": torch.full_like(args["flip"], f)}) for f in (False, True))
    assert torch.equal(plain.flip(3), mirrored)
    assert torch.equal(run(impl, **args | {"flip": None}), plain)


@pytest.mark.parametrize("impl", WAYS)
def test_sees_nothing_outside_the_box(impl, on):
    args = make(SMALL._replace(layout="nchw"), on(impl))
    before, loud = run(impl, **args), args["img"].clone()
    for image, (top, left, height, width) in zip(loud, args["boxes"].tolist()):
        inside = image[:, top : top + height, left : left + width].clone()
        image.fill_(255)
        image[:, top : top + height, left : left + width] = inside
    assert torch.equal(run(impl, **args | {"img": loud}), before)


@pytest.mark.parametrize("impl", WAYS)
def test_a_buffer_of_images_of_any_shape(impl, on):
    device = on(impl)
    images = [smooth(1, h, w)[0].permute(1, 2, 0).contiguous().to(device) for h, w in [(30, 41), (17, 60), (5, 3)]]
    shapes = torch.tensor([i.shape[:2] for i in images], dtype=torch.int32, device=device)
    ends = torch.tensor([i.numel() for i in images], device=device).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    boxes = torch.tensor([[1, 2, 20, 30], [0, 0, 17, 60], [1, 1, 4, 2]], dtype=torch.int32, device=device)
    rest = {"flip": torch.tensor([False, True, True], device=device), "size": 19, "filter": "bicubic"}
    buffer = torch.cat([i.flatten() for i in images])
    got = run(impl, img=buffer, boxes=boxes, offsets=offsets, shapes=shapes, **rest)
    for b, image in enumerate(images):
        one = {"img": image[None], "boxes": boxes[b : b + 1], "flip": rest["flip"][b : b + 1]}
        assert torch.equal(run(impl, **rest | one)[0], got[b])


@pytest.mark.parametrize("impl", WAYS)
def test_an_image_outside_its_buffer_gives_zeros(impl, on):
    device = on(impl)
    buffer = torch.full((3 * 4 * 5,), 200, dtype=torch.uint8, device=device)
    offsets = torch.tensor([0, 1, -1, 2**62, 0, 0, 0], device=device)
    shapes = torch.tensor([[4, 5]] * 4 + [[5, 4 + 1], [0, 5], [2**31 - 1, 5]], dtype=torch.int32, device=device)
    boxes = torch.tensor([[0, 0, 4, 5]], dtype=torch.int32, device=device).repeat(7, 1)
    args = {"img": buffer, "boxes": boxes, "flip": None, "size": 6, "offsets": offsets, "shapes": shapes}
    got = run(impl, filter="bilinear", **args)
    assert (got[0] == 200).all()
    assert (got[1:] == 0).all()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_sums_are_exact_in_fp32(filter):
    """Weights add up to 2^15 and their sizes times 255 stay below 2^24."""
    for out in (1, 2, 7, 32, 224):
        lengths = torch.tensor([*range(1, 40), 97, 223, 224, 225, 448, 500])
        weights = _weights(torch.zeros_like(lengths), lengths, 500, out, filter == "bicubic")
        assert (weights.sum(2) == 2**15).all()
        assert 255 * weights.abs().sum(2).max() < 2**24


def test_positions_of_the_largest_images_fit():
    for impl in ("cpu", "ref"):
        skip_unless(impl, "cpu")
        img = (torch.arange(MAX_SIDE) // 4096 * 16).byte().view(1, 1, 1, -1).expand(1, 3, 1, -1)
        boxes = torch.tensor([[0, 0, 1, MAX_SIDE]], dtype=torch.int32)
        got = crop_resize(img, boxes, None, 16, impl=impl)[0, 0, 0]
        assert torch.equal(
            got, pillow({"img": img, "boxes": boxes, "flip": torch.zeros(1), "size": 16} | BICUBIC)[0, 0, 0]
        )


BICUBIC = {"filter": "bicubic"}


def test_threads_change_nothing():
    skip_unless("cpu", "cpu")
    args, before, found = make(SMALL), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(crop_resize(**args, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_fills_what_it_is_given(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    out = torch.empty(3, 3, 18, 18, dtype=torch.uint8, device=device)
    assert crop_resize(**args, out=out, impl=impl) is out
    assert torch.equal(out, crop_resize(**args, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["nchw", "packed"])
def test_contract(layout, impl, device):
    skip_unless(impl, device)
    a = make(SMALL._replace(layout=layout), device)
    out = torch.empty(3, 3, 18, 18, dtype=torch.uint8, device=device)
    args = (a["img"], a["boxes"], a["flip"], True, a.get("offsets"), a.get("shapes"), out, impl)
    torch.library.opcheck(torch.ops.mimfast.crop_resize, args)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("layout", ["nhwc", "packed"])
def test_compiles_without_a_graph_break(layout, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(layout=layout), device)
    torch._dynamo.reset()  # each choice of arguments is a compilation of its own, and there is a limit
    compiled = torch.compile(partial(crop_resize, impl=impl), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**args), crop_resize(**args, impl="ref"))


def test_limit_is_that_of_the_core():
    if _native.core() is None:
        pytest.skip(_native.why_missing())
    assert _native.core().CROP_MAX_SIDE == MAX_SIDE


IMG, BOXES = torch.zeros(2, 9, 8, 3, dtype=torch.uint8), torch.tensor([[0, 0, 9, 8], [1, 2, 3, 4]], dtype=torch.int32)
FLAT = {"img": IMG.flatten(), "offsets": torch.tensor([0, 216]), "shapes": torch.tensor([[9, 8]] * 2).int()}
BAD = [
    ({"img": IMG.float()}, r"img has dtype float32, expected uint8 because it holds 8-bit pixels"),
    ({"img": IMG[..., :2]}, r"img has shape \(2, 9, 8, 2\), expected \(B, 3, H, W\) or \(B, H, W, 3\) because"),
    ({"img": IMG[:1]}, r"img has 1 images, expected 2 because there are 2 boxes"),
    ({"img": IMG[:, :0]}, r"img has 0 x 8 pixels, expected sides from 1 to 65536 because"),
    ({"boxes": BOXES.long()}, r"boxes has dtype int64, expected int32"),
    ({"boxes": BOXES[:, :3]}, r"boxes has shape \(2, 3\), expected \(any, 4\) because a box is top, left"),
    ({"flip": torch.zeros(3, dtype=torch.bool)}, r"flip has shape \(3,\), expected \(2\) because there are 2 boxes"),
    ({"flip": torch.zeros(2)}, r"flip has dtype float32, expected bool"),
    ({"size": 0}, r"size has 0, expected 1 to 65536"),
    ({"filter": "nearest"}, r"filter has 'nearest', expected 'bilinear' or 'bicubic' because"),
    ({"out": torch.zeros(2, 3, 4, 5).byte()}, r"out has shape \(2, 3, 4, 5\), expected \(2, 3, 4, 4\)"),
    ({"out": torch.zeros(2, 4, 4, 3).byte().permute(0, 3, 1, 2)}, r"out has gaps between its pixels"),
    ({"offsets": FLAT["offsets"]}, r"shapes has None, expected a tensor because a buffer needs offsets and shapes"),
    (FLAT | {"img": IMG}, r"img has shape \(2, 9, 8, 3\), expected \(any\) because with offsets"),
    (FLAT | {"img": IMG.flatten()[::2]}, r"img has gaps between its bytes"),
    (FLAT | {"shapes": FLAT["shapes"].long()}, r"shapes has dtype int64, expected int32"),
    ({"impl": "triton"}, r"impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref' because"),
]
OUTSIDE = [
    ({"boxes": BOXES + 1}, r"boxes has top 1, left 1, height 10, width 9 for image 0, expected a box inside the image"),
    ({"boxes": BOXES - 1}, r"boxes has top -1, left -1, height 8, width 7 for image 0"),
    ({"boxes": BOXES * torch.tensor([1, 1, 1, 0]).int()}, r"width 0 for image 0, .* because image 0 has 9 x 8 pixels"),
    (FLAT | {"offsets": FLAT["offsets"] + 1}, r"offsets has 217 for image 1, expected 0 to 216 because 9 x 8 pixels"),
    (FLAT | {"shapes": FLAT["shapes"] * 0}, r"shapes has 0 x 0 for image 0, expected sides from 1 to 65536"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="crop_resize: " + message):
        crop_resize(**{"img": IMG, "boxes": BOXES, "flip": None, "size": 4} | change)


@pytest.mark.parametrize(("change", "message"), OUTSIDE, ids=[m[:24] for _, m in OUTSIDE])
def test_says_what_is_outside_when_asked_to_look(change, message):
    args = {"img": IMG, "boxes": BOXES, "flip": None, "size": 4}
    crop_resize(**args, checked=True)
    with pytest.raises(UserError, match="crop_resize: .*" + message):
        crop_resize(**args | change, checked=True)
    assert crop_resize(**args | change).shape == (2, 3, 4, 4)
