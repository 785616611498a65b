"""local_norm: parity with the reference and with average pooling, the contract, properties, messages."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import UserError
from mimfast._images import IMAGENET_STD, normalize
from mimfast.ops.local_norm import IMPLS, MAX_BOX_UINT8, MAX_WIDTH_CUDA, local_norm, local_norm_ref, run_native
from mimfast.testing import FLOOR_ULPS, emulated, poisoned, skip_unless
from mimfast.testing.local_norm import CASES, Case, make, pooled

SMALL = Case(2, 21, 18, 5)
WAYS = ["emulated", *IMPLS]


def run(impl: str, img: Tensor, window: int) -> Tensor:
    """local_norm, also by the emulated CUDA kernel."""
    if impl != "emulated":
        return local_norm(img, window, impl=impl)
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    out = torch.full(img.shape, float("nan"))
    run_native(emulated.core(), "cuda", img, window, 1e-6, list(IMAGENET_STD), out)
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


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, impl, on):
    args = make(case, on(impl))
    with poisoned():
        got = run(impl, **args)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    wide = args["img"].double() if args["img"].is_floating_point() else normalize(args["img"], dtype=torch.float64)
    want, plain = pooled(wide, case.window, torch.float64), pooled(args["img"], case.window)
    if got.numel() == 0:
        return
    error, theirs = ((x - want).abs().max().item() for x in (got, plain))
    largest = max(want.abs().max().item(), 1e-3)
    allowed = 2 * theirs + FLOOR_ULPS * torch.finfo(torch.float32).eps * largest
    print(f"error {error:.2e}, average pooling {theirs:.2e}, allowed {allowed:.2e}")
    assert error <= allowed
    if case.img == "uint8":
        assert error <= 4 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("impl", WAYS)
def test_agrees_with_the_formula_written_out(impl, on):
    args = make(SMALL._replace(batch=1, height=7, width=6), on(impl))
    x, got = normalize(args["img"], dtype=torch.float64), run(impl, **args)
    for c, i, j in [(0, 0, 0), (1, 3, 3), (2, 6, 5), (0, 6, 2)]:
        box = [
            x[0, c, y, z].item()
            for y in range(max(i - 2, 0), min(i + 3, 7))
            for z in range(max(j - 2, 0), min(j + 3, 6))
        ]
        mean = sum(box) / len(box)
        variance = sum((v - mean) ** 2 for v in box) / (len(box) - 1)
        want = (x[0, c, i, j].item() - mean) / math.sqrt(variance + 1e-6)
        assert got[0, c, i, j].item() == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("impl", WAYS)
def test_constant_images_give_zeros(impl, on):
    device = on(impl)
    for value in (0, 77, 255):
        got = run(impl, torch.full((1, 3, 20, 30), value, dtype=torch.uint8, device=device), 9)
        assert got.abs().max() <= (1e-9 if impl == "ref" else 0)
    assert run(impl, torch.full((1, 3, 20, 30), 0.3, device=device), 9).abs().max() < 1e-6


@pytest.mark.parametrize("impl", WAYS)
def test_bright_noise_on_the_widest_box_does_not_overflow(impl, on):
    device = on(impl)
    img = torch.full((1, 3, 40, 260), 255, dtype=torch.uint8, device=device)
    img[..., ::2, 1::3] = 254
    got, want = run(impl, img, MAX_BOX_UINT8), local_norm_ref(img, MAX_BOX_UINT8)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", WAYS)
def test_standardises_and_does_not_see_brightness(impl, on):
    args = make(SMALL._replace(height=64, width=64, window=127), on(impl))
    got = run(impl, **args)
    torch.testing.assert_close(got.mean((2, 3)), torch.zeros(2, 3, device=got.device), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.var((2, 3)), torch.ones(2, 3, device=got.device), rtol=1e-3, atol=0)
    half = args["img"] // 2
    torch.testing.assert_close(run(impl, half + 100, 9), run(impl, half, 9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", WAYS)
def test_flipping_the_image_flips_the_result(impl, on):
    args = make(SMALL, on(impl))
    got = run(impl, **args)
    for dims in ((2,), (3,), (2, 3)):
        tolerance = 1e-6 if impl == "ref" else 0
        torch.testing.assert_close(run(impl, args["img"].flip(dims), 5).flip(dims), got, rtol=0, atol=tolerance)


def test_threads_change_nothing():
    skip_unless("cpu", "cpu")
    args, before, found = make(Case(4, 128, 128, 47, "fp32")), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(local_norm(**args, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


def test_gradient_of_ref():
    img = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(local_norm_ref, window=3), img)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "ref"])
def test_contract(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    torch.library.opcheck(torch.ops.mimfast.local_norm, (args["img"], 5, 1e-6, [0.2, 0.2, 0.3], impl))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("img", ["uint8", "bf16"])
def test_compiles_without_a_graph_break(img, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(img=img, layout="nhwc"), device)
    compiled = torch.compile(partial(local_norm, impl=impl), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**args), local_norm_ref(**args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = local_norm(**args, impl=impl)
    assert torch.equal(inside, local_norm(**args, impl=impl))


def test_limits_are_those_of_the_core():
    if _native.core() is None:
        pytest.skip(_native.why_missing())
    assert _native.core().LOCAL_NORM_MAX_BOX_UINT8 == MAX_BOX_UINT8
    assert _native.core().LOCAL_NORM_MAX_WIDTH_CUDA == MAX_WIDTH_CUDA


def test_auto_takes_the_reference_where_the_kernel_cannot():
    wide = torch.randint(0, 256, (1, 3, 4, 300), dtype=torch.uint8)
    assert torch.equal(local_norm(wide, 401), local_norm_ref(wide, 401))
    assert local_norm(wide.double(), 5).dtype == torch.float64


IMG = torch.zeros(1, 3, 8, 8)
BAD = [
    ({"img": torch.zeros(1, 1, 8, 8)}, r"img has shape \(1, 1, 8, 8\), expected \(any, 3, any, any\) because"),
    ({"img": torch.zeros(1, 3, 8, 8, dtype=torch.int16)}, r"img has dtype int16, expected uint8 or float32 or"),
    ({"img": torch.zeros(1, 3, 0, 8)}, r"img has 0 x 8 pixels, expected 1 x 1 or more because"),
    ({"window": 46}, r"window has 46, expected an odd number of pixels because the box has a pixel in its middle"),
    ({"window": -1}, r"window has -1, expected an odd number"),
    ({"eps": 0.0}, r"eps has 0.0, expected a number above 0 because flat parts"),
    ({"std": (0.2, 0.0, 0.2)}, r"std has \(0.2, 0.0, 0.2\), expected three numbers above 0 because"),
    ({"impl": "triton"}, r"impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref' because"),
    ({"img": IMG.double(), "impl": "cpu"}, r"impl has 'cpu', .* because .* float64"),
    ({"img": IMG.clone().requires_grad_(), "impl": "cpu"}, r"because it has no gradient for img"),
    (
        {"img": torch.zeros(1, 3, 4, 300, dtype=torch.uint8), "window": 257, "impl": "cpu"},
        r"because sums of squares are kept in 32 bits, which suits windows up to 255, not 257",
    ),
    (
        {"img": torch.zeros(1, 3, 4, 1025), "impl": "cuda"},
        r"because the kernel keeps a row .* suits 1024 pixels, not 1025",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="local_norm: .*" + message):
        local_norm(**{"img": IMG, "window": 5} | change)
