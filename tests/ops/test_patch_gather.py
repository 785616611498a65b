"""patch_gather: parity with the reference, the reference against a convolution's unfold, contract, bounds, messages."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.ops.patch_gather import IMPLS, image_of_rows, patch_gather, patch_gather_ref
from mimfast.testing import poisoned, skip_unless
from mimfast.testing.patch_gather import CASES, Case, make

SMALL = Case(2, 8, 12, 4)
HALVES = [torch.bfloat16, torch.float16]
KERNELS = [impl for impl in IMPLS if impl != "ref"]
# Triton multiplies and adds where the reference divides twice: fp32 units in the last place of the largest product, and
# half precision may then round to the next value, where the interpreter truncates to bfloat16 instead of rounding
ULPS = {torch.float32: 8 * 2**-24, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_like_ref(found: Tensor, wanted: Tensor, impl: str) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    if impl == "cpu":
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=ULPS[wanted.dtype], atol=8 * 2**-22)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, impl, device):
    """The native code equals the reference to the bit."""
    skip_unless(impl, device)
    args = make(case, device)
    with poisoned():
        found = patch_gather(**args, impl=impl)
    assert_like_ref(found, patch_gather_ref(**args), impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_error_is_at_most_twice_that_of_torch(impl, device):
    skip_unless(impl, device)
    args = make(Case(4, 32, 32, 16), device)
    truth = patch_gather_ref(**args | {"dtype": torch.float64})
    ours, theirs = (
        (f(**args) - truth).abs().max().item() for f in (partial(patch_gather, impl=impl), patch_gather_ref)
    )
    print(f"error {ours:.3e}, torch {theirs:.3e}, both against fp64")
    assert ours <= 2 * theirs


@pytest.mark.parametrize("order", ["cpq", "pqc"])
@pytest.mark.parametrize("case", [c for c in CASES if c.rows != "packed" and c.batch], ids=str)
def test_ref_is_unfold_then_gather(case, order):
    args = make(case._replace(order=order, out="fp32"))
    img, p = normalize(args["img"]).float(), case.patch
    if "flip" in args:
        img = torch.stack([i.flip(-1) if f else i for i, f in zip(img, args["flip"].tolist())])
    rows_BLE = F.unfold(img, p, stride=p).transpose(1, 2)  # (c, p, q) rows
    if order == "pqc":
        rows_BLE = rows_BLE.unflatten(-1, (3, p * p)).transpose(-1, -2).flatten(-2)
    if "keep" in args:
        rows_BLE = rows_BLE.gather(1, args["keep"][..., None].expand(-1, -1, 3 * p * p))
    assert torch.equal(patch_gather(**args, impl="ref"), rows_BLE)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_are_those_of_each_image_alone(impl, device):
    skip_unless(impl, device)
    args = make(Case(5, 8, 12, 4, rows="packed", flip=True), device)
    got, bounds = patch_gather(**args, impl=impl), args["cu_seqlens"].tolist()
    for b in range(5):
        keep = args["keep"][bounds[b] : bounds[b + 1]][None]
        alone = patch_gather(args["img"][b : b + 1], keep, patch=4, flip=args["flip"][b : b + 1], impl=impl)
        assert torch.equal(got[bounds[b] : bounds[b + 1]], alone[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_default_dtypes(impl, device):
    skip_unless(impl, device)
    for img, wanted in (("uint8", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        args = make(SMALL._replace(img=img), device) | {"dtype": None}
        assert patch_gather(**args, impl=impl).dtype == wanted


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_special_values_pass_through_every_conversion(dtype, impl, device):
    skip_unless(impl, device)
    inf = float("inf")
    values = [0.0, -0.0, inf, -inf, 1.0, -65504.0, 65519.0, 65520.0, 2.0**-14, 2.0**-15, -(2.0**-24), 3 * 2.0**-26]
    values += [2.0**-25, 1.0009765625, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 6.0e-5, 3.0e38]
    img = torch.tensor(values * 3, device=device).to(dtype)[:48].view(1, 3, 4, 4)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        found, wanted = (patch_gather(img, patch=4, dtype=out, impl=i) for i in (impl, "ref"))
        if out == torch.bfloat16 and impl == "triton" and device == "cpu":
            continue  # the interpreter truncates
        assert torch.equal(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())
    nan = torch.full_like(img, float("nan"))
    assert all(patch_gather(nan, patch=4, dtype=d, impl=impl).isnan().all() for d in [*HALVES, torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the native CPU code")
def test_every_half_converts_as_torch_does():
    skip_unless("cpu", "cpu")
    bits = torch.arange(2**16 - 1, dtype=torch.int32)[: 3 * 145 * 150].to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        img = bits.view(dtype).view(1, 3, 145, 150)
        for out in (torch.float32, torch.float16, torch.bfloat16):
            found, wanted = (patch_gather(img, patch=5, dtype=out, impl=i) for i in ("cpu", "ref"))
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_but_the_kept_patches_is_read(impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(img="fp32"), device)
    want = patch_gather(**args, impl=impl)
    kept_BL = torch.zeros(2, 6, dtype=torch.bool, device=device).scatter_(1, args["keep"], True)
    pixels = kept_BL.view(2, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    args["img"] = args["img"].masked_fill(~pixels, float("nan"))
    assert torch.equal(patch_gather(**args, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_index_out_of_range_gives_zeros(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device) | {"flip": torch.tensor([True, False], device=device)}
    keep = torch.tensor([[-1, 2, 2**62, 5], [6, -(2**63), 0, 0]], device=device)
    with poisoned():
        got = patch_gather(**args | {"keep": keep}, impl=impl)
    bad = (keep < 0) | (keep > 5)
    assert not got[bad].any()
    good = patch_gather(**args | {"keep": keep.clamp(0, 5)}, impl=impl)
    assert torch.equal(got[~bad], good[~bad])
    args |= {"keep": torch.arange(6, device=device)}
    bounds = torch.tensor([1, 3, 4], dtype=torch.int32, device=device)  # rows 0, 4 and 5 belong to nobody
    with poisoned():
        got = patch_gather(**args, cu_seqlens=bounds, impl=impl)
    assert got.any(1).tolist() == [False, True, True, True, False, False]
    assert_like_ref(got, patch_gather(**args, cu_seqlens=bounds, impl="ref"), impl if impl != "ref" else "cpu")


@pytest.mark.parametrize("impl", KERNELS)
def test_bounds_that_make_no_sense_stay_inside_memory(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device) | {"keep": torch.arange(6, device=device)}
    for bounds in ([9, -5, 3], [2**31 - 1, 0, -(2**31)], [5, 5, 0], [0, 0, 0]):
        out = patch_gather(**args, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device), impl=impl)
        assert out.shape == (6, 48)
        assert out.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_indices_and_flags(impl, device):
    skip_unless(impl, device)
    args = make(Case(3, 12, 12, 4, flip=True), device)
    wide = {"keep": args["keep"].repeat_interleave(2, 1)[:, ::2], "flip": args["flip"].repeat_interleave(3)[::3]}
    assert not wide["keep"].is_contiguous()
    assert torch.equal(patch_gather(**args | wide, impl=impl), patch_gather(**args, impl=impl))
    expanded = args["keep"][:1].expand(3, -1)
    assert torch.equal(
        patch_gather(**args | {"keep": expanded}, impl=impl),
        patch_gather(**args | {"keep": expanded.clone()}, impl=impl),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the native CPU code")
@pytest.mark.parametrize("rows", ["kept", "all", "packed"])
def test_threads_change_nothing(rows):
    skip_unless("cpu", "cpu")
    args = make(Case(9, 112, 112, 16, rows=rows, flip=True, kept=0.7))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        found = patch_gather(**args, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, patch_gather(**args, impl="ref"))


@pytest.mark.parametrize("impl", KERNELS)
def test_contract(impl, device):
    skip_unless(impl, device)
    op, stats = torch.ops.mimfast.patch_gather, ([0.5, 0.4, 0.3], [0.2, 0.2, 0.3])
    for rows in ("kept", "all", "packed"):
        args = make(SMALL._replace(rows=rows, flip=rows == "kept"), device)
        tensors = (args["img"], *(args.get(name) for name in ("keep", "flip", "cu_seqlens")))
        torch.library.opcheck(op, (*tensors, 4, *stats, "pqc", torch.float16, impl))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("rows", ["kept", "all", "packed"])
def test_compiles_without_a_graph_break(rows, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(rows=rows, flip=True), device)
    compiled = torch.compile(partial(patch_gather, impl=impl), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**args), patch_gather(**args, impl="ref"))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = patch_gather(**args, impl=impl)
    assert torch.equal(inside, patch_gather(**args, impl=impl))


def test_gradient_of_ref():
    args = make(Case(2, 4, 6, 2, "fp32", flip=True))
    img = args.pop("img").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_gather(x, **args | {"dtype": torch.float64}), img)


def test_fused_code_takes_an_image_with_gradient_where_none_is_asked_for(device):
    impl = "triton" if device == "cuda" else "cpu"
    skip_unless(impl, device)
    args = make(SMALL._replace(img="fp32"), device)
    args["img"].requires_grad_()
    assert patch_gather(**args).requires_grad  # auto takes the reference
    with torch.no_grad():
        assert not patch_gather(**args, impl=impl).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU")
def test_graph_capture_with_new_indices_and_a_side_stream(device):
    args = make(Case(2, 64, 64, 16, out="bf16"), device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = patch_gather(**args, impl="triton")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(on_side, patch_gather(**args, impl="triton"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = patch_gather(**args, impl="triton")
    args["keep"].copy_(args["keep"].flip(0))
    graph.replay()
    assert torch.equal(captured, patch_gather(**args, impl="triton"))


def test_checked_accepts_what_is_right(device):
    for rows in ("kept", "all", "packed"):
        args = make(Case(3, 8, 12, 4, rows=rows), device)
        assert torch.equal(patch_gather(**args, checked=True), patch_gather(**args))
    assert image_of_rows(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 3).tolist() == [0, 0, 2]


PACKED = {"keep": torch.arange(4), "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)}
BAD = [
    ({"img": torch.zeros(2, 3, 8, 10)}, r"img has 8 x 10 pixels, expected multiples of 4 because patches are 4 x 4"),
    ({"img": torch.zeros(2, 3, 0, 12)}, r"img has 0 x 12 pixels, expected multiples of 4"),
    ({"img": torch.zeros(2, 1, 8, 12)}, r"img has shape \(2, 1, 8, 12\), expected \(any, 3, any, any\) because"),
    ({"img": torch.zeros(2, 3, 8, 12, dtype=torch.int32)}, r"img has dtype int32, expected uint8 or float32 or"),
    ({"img": torch.zeros(2, 3, 8, 12, device="meta")}, r"keep has device cpu, expected meta because img is there"),
    ({"keep": torch.zeros(3, 2, dtype=torch.int64)}, r"keep has shape \(3, 2\), expected \(2, any\) because it holds"),
    ({"keep": torch.zeros(2, 2, dtype=torch.int32)}, r"keep has dtype int32, expected int64 because"),
    ({"patch": 0}, r"patch has 0, expected 1 or more because"),
    ({"order": "qpc"}, r"order has 'qpc', expected 'cpq' or 'pqc' because"),
    ({"std": (0.2, 0.0, 0.2)}, r"std has \(0.2, 0.0, 0.2\), expected three numbers above 0 because"),
    ({"dtype": torch.uint8}, r"dtype has uint8, expected a floating-point type because"),
    ({"flip": torch.zeros(3, dtype=torch.bool)}, r"flip has shape \(3,\), expected \(2\) because it holds one bool"),
    ({"flip": torch.zeros(2)}, r"flip has dtype float32, expected bool because"),
    (PACKED | {"keep": None}, r"keep has None, expected \(T,\) indices because cu_seqlens packs"),
    (PACKED | {"keep": torch.zeros(2, 2, dtype=torch.int64)}, r"keep has shape \(2, 2\), expected \(any\) because"),
    (
        PACKED | {"cu_seqlens": torch.zeros(2, dtype=torch.int32)},
        r"cu_seqlens has shape \(2,\), expected \(3\) because",
    ),
    (PACKED | {"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, r"cu_seqlens has dtype int64, expected int32 because"),
    (
        {"img": torch.zeros(0, 3, 8, 12), "keep": torch.arange(2), "cu_seqlens": torch.zeros(1, dtype=torch.int32)},
        r"keep has 2 rows, expected 0 because there are 0 images",
    ),
    ({"impl": "cuda"}, r"impl has 'cuda', expected one of 'auto', 'triton', 'cpu', 'ref' because"),
    ({"dtype": torch.float64, "impl": "cpu"}, r"impl has 'cpu', .* because it computes in float32 and was asked for"),
    (
        {"img": torch.zeros(2, 3, 8, 12, requires_grad=True), "impl": "cpu"},
        r"because it has no gradient for img; detach the image, or use 'ref'",
    ),
    (
        {"keep": torch.tensor([[0, 6], [1, -1]]), "checked": True},
        r"keep has 2 indices like 6, expected 0..5 because an image has 6 patches",
    ),
    (
        {"keep": torch.tensor([[0, 5], [4, 4]]), "checked": True},
        r"keep has patch 4 of image 1 2 times, expected distinct indices because a patch is shown once",
    ),
    (
        PACKED | {"cu_seqlens": torch.tensor([0, 3, 2], dtype=torch.int32), "checked": True},
        r"cu_seqlens has \[0, 3, 2\], expected ascending numbers from 0 to 4 because they tile the rows",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:28] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="patch_gather: .*" + message):
        patch_gather(**make(SMALL) | change)
