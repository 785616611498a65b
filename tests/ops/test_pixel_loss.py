"""pixel_loss: parity with the reference, the reference itself, the contract, properties, messages."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.ops.pixel_loss import IMPLS, KINDS, ORDERS, pixel_loss, pixel_loss_ref
from mimfast.testing import assert_close_to_ref, poisoned, skip_unless
from mimfast.testing.pixel_loss import CASES, Case, in_full, make

SMALL = Case(2, 8, 12, 4)
COMPACT = SMALL._replace(hidden="compact", ratio=0.5)
KERNELS = [impl for impl in IMPLS if impl != "ref"]
TAKEN = [(case, impl) for case in CASES for impl in KERNELS if impl != "cpu" or case.pred != "fp16"]


@pytest.mark.parametrize(("case", "impl"), TAKEN, ids=str)
def test_value_and_gradient(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    if case.pred == "bf16" and device == "cpu" and impl == "triton":
        # Triton's interpreter truncates to bfloat16 where the hardware rounds, so there only the loss can be judged
        args["pred"] = args["pred"].detach()
    with poisoned():
        assert_close_to_ref(partial(pixel_loss, impl=impl), pixel_loss_ref, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_formula_written_out(kind, norm, order, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(kind=kind, norm=norm, order=order), device)
    got = pixel_loss(**args, impl=impl).item()
    assert got == pytest.approx(formula(**args), rel=1e-5)


def formula(
    pred: Tensor, img: Tensor, hidden: Tensor, patch: int, norm: bool, kind: str, order: str, beta: float
) -> float:  # fmt: skip
    """MAE section 3 pixel by pixel, in Python floats."""
    img, cols, losses = normalize(img, dtype=torch.float64), img.shape[3] // patch, []
    for b, token in hidden.nonzero().tolist():
        top, left = token // cols * patch, token % cols * patch
        y_x_c = [(y, x, c) for y in range(patch) for x in range(patch) for c in range(3)]
        if order == "cpq":
            y_x_c = [(y, x, c) for c in range(3) for y in range(patch) for x in range(patch)]
        t = [img[b, c, top + y, left + x].item() for y, x, c in y_x_c]
        if norm:
            mean = sum(t) / len(t)
            var = sum((v - mean) ** 2 for v in t) / (len(t) - 1)
            t = [(v - mean) / math.sqrt(var + 1e-6) for v in t]
        d = [abs(p - v) for p, v in zip(pred[b, token].tolist(), t)]
        smooth = [v * v / (2 * beta) if v < beta else v - beta / 2 for v in d]
        f = {"mse": [v * v for v in d], "l1": d, "smooth_l1": smooth}[kind]
        losses.append(sum(f) / len(f))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hidden", ["map", "compact"])
def test_colour_major_rows_are_what_pixel_shuffle_takes(hidden, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(hidden=hidden, order="cpq", kind="l1", norm=False, ratio=1.0), device)
    if hidden == "compact":
        args["hidden"] = args["hidden"].sort(-1).values
    map_BDhw = args["pred"].mT.unflatten(2, (2, 3))
    want = (F.pixel_shuffle(map_BDhw, 4) - normalize(args["img"])).abs().mean()
    loss, (grad,) = _loss_and_grad(args, impl)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want, args["pred"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_ref(kind):
    args = make(SMALL._replace(batch=1, height=4, kind=kind))
    pred = args.pop("pred").detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: pixel_loss_ref(p, **args), pred)


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize(("pred", "impl"), [("fp32", "triton"), ("fp16", "triton"), ("fp32", "cpu"), ("bf16", "cpu")])
def test_backward_twice_gives_the_same_and_leaves_the_first_alone(pred, impl, upstream, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(pred=pred), device)
    x = args["pred"]
    (want,) = torch.autograd.grad(upstream * pixel_loss(**args, impl="ref"), x)
    loss = pixel_loss(**args, impl=impl)
    (first,) = torch.autograd.grad(upstream * loss, x, retain_graph=True)
    (other,) = torch.autograd.grad(3 * upstream * loss, x, retain_graph=True)
    (last,) = torch.autograd.grad(upstream * loss, x)
    assert torch.equal(first, last)
    torch.testing.assert_close(first, want)
    torch.testing.assert_close(other, 3 * want)


def test_small_fp16_gradients_survive_a_loss_scale(device):
    skip_unless("triton", device)
    args = make(SMALL._replace(pred="fp16"), device)
    args["pred"] = (args["pred"] * 1e-3).detach().requires_grad_()
    impls = ("triton", "ref")
    grads = [torch.autograd.grad(pixel_loss(**args, impl=i) * 2.0**-14, args["pred"])[0] for i in impls]
    assert grads[1].count_nonzero() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_in_visible_patches_matters(impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(img="fp32"), device)
    visible_BL = ~args["hidden"]
    pixels = visible_BL.view(2, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(args["img"])
    spoilt = dict(args, img=args["img"].masked_fill(pixels, float("nan")))
    spoilt["pred"] = args["pred"].detach().masked_fill(visible_BL[..., None], float("nan")).requires_grad_()
    with poisoned():
        loss, (grad,) = _loss_and_grad(spoilt, impl)
    want, (want_grad,) = _loss_and_grad(args, impl)
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)
    assert not grad[visible_BL].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_hidden_patch_costs_nothing(impl, device):
    skip_unless(impl, device)
    loss, (grad,) = _loss_and_grad(
        dict(make(SMALL, device), hidden=torch.zeros(2, 6, dtype=torch.bool, device=device)), impl
    )
    assert loss.item() == 0
    assert not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_patches_and_exact_predictions(impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(img="fp32"), device) | {"img": torch.full((2, 3, 8, 12), 0.5, device=device)}
    args["pred"] = torch.zeros(2, 6, 48, device=device, requires_grad=True)
    for kind in KINDS:
        loss, (grad,) = _loss_and_grad(args | {"kind": kind}, impl)
        assert loss.item() == 0
        assert not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_indices_mean_the_same_as_the_map(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    indices = args["hidden"].nonzero()[:, 1].view(2, -1).flip(-1)
    beyond = torch.tensor([[-1, 6], [2**62, -(2**62)]], device=device)
    padded = torch.cat([indices[:, :2], beyond, indices], 1)  # twice is once here, and out of range is nothing
    want = _loss_and_grad(args, impl)
    for hidden in (indices, padded):
        got = _loss_and_grad(args | {"hidden": hidden}, impl)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1][0], want[1][0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_compact_means_the_same_as_full(ratio, impl, device):
    skip_unless(impl, device)
    args = make(COMPACT._replace(ratio=ratio), device)
    full = in_full(args)
    (loss, (grad,)), (want, (want_grad,)) = (_loss_and_grad(a, impl) for a in (args, full))
    assert grad.shape == args["pred"].shape
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    picked = want_grad.gather(1, args["hidden"][..., None].expand_as(grad))
    torch.testing.assert_close(grad, picked, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beyond", [-1, 6, 2**62])
def test_rows_of_indices_out_of_range_count_for_nothing(beyond, impl, device):
    skip_unless(impl, device)
    args = make(COMPACT, device)
    args["hidden"][0, 1] = beyond
    args["pred"] = args["pred"].detach()
    args["pred"][0, 1] = float("nan")
    args["pred"].requires_grad_()
    with poisoned():
        loss, (grad,) = _loss_and_grad(args, impl)
    others = [_loss_and_grad(in_full(_rows(args, b, r)), impl)[0] for b, r in ((0, [0, 2]), (1, [0, 1, 2]))]
    torch.testing.assert_close(loss, (2 * others[0] + 3 * others[1]) / 5)
    assert not grad[0, 1].any()
    assert grad.isfinite().all()
    assert grad[0, [0, 2]].count_nonzero() > 90


def _rows(args: dict, b: int, rows: list[int]) -> dict:
    return args | {k: args[k].detach()[b : b + 1, rows] for k in ("pred", "hidden")} | {"img": args["img"][b : b + 1]}


@pytest.mark.parametrize(("case", "impl"), [(c, i) for c in (SMALL, COMPACT) for i in KERNELS], ids=str)
def test_permuting_images_permutes_the_gradient(case, impl, device):
    skip_unless(impl, device)
    args = make(case._replace(batch=4), device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    moved = {k: v[order] if isinstance(v, Tensor) else v for k, v in args.items()}
    moved["pred"] = moved["pred"].detach().requires_grad_()
    (loss, (grad,)), (loss_moved, (grad_moved,)) = (_loss_and_grad(a, impl) for a in (args, moved))
    assert torch.equal(grad[order], grad_moved)
    torch.testing.assert_close(loss, loss_moved)


@pytest.mark.parametrize("hidden", ["map", "compact"])
@pytest.mark.parametrize("pred", ["fp32", "bf16"])
def test_threads_change_nothing(pred, hidden):
    skip_unless("cpu", "cpu")
    args, before = make(Case(8, 112, 112, 16, pred, hidden=hidden)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(_loss_and_grad(args, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f[0], found[0][0]) and torch.equal(f[1][0], found[0][1][0]) for f in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_and_misaligned_inputs(impl, device):
    skip_unless(impl, device)
    args = make(COMPACT, device)
    M, D = args["pred"].shape[1:]
    args["img"] = (
        torch.arange(1 + 3 * 8 * 12, device=device).to(torch.uint8)[1:].view(1, 3, 8, 12).expand(2, -1, -1, -1)
    )
    args["hidden"] = torch.tensor([9, 4, 0, 5], device=device)[1:].expand(2, -1)
    args["pred"] = torch.randn(1 + 2 * M * D, device=device)[1:].view(2, M, D).requires_grad_()
    dense = args | {k: args[k].detach().clone(memory_format=torch.contiguous_format) for k in ("img", "hidden", "pred")}
    dense["pred"].requires_grad_()
    (loss, (grad,)), (want, (want_grad,)) = (_loss_and_grad(a, impl) for a in (args, dense))
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("impl", KERNELS)
def test_prediction_without_gradient(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    want = pixel_loss(**args, impl=impl)
    assert torch.equal(pixel_loss(**args | {"pred": args["pred"].detach()}, impl=impl), want)
    with torch.no_grad():
        loss = pixel_loss(**args, impl=impl)
    assert torch.equal(loss, want)
    assert not loss.requires_grad


@pytest.mark.parametrize("impl", KERNELS)
def test_nan_in_a_hidden_patch_is_not_hushed_up(impl, device):
    skip_unless(impl, device)
    for kind in KINDS:
        args = make(COMPACT._replace(kind=kind), device)
        args["pred"] = args["pred"].detach().index_fill_(1, torch.tensor([1], device=device), float("nan"))
        args["pred"].requires_grad_()
        loss, (grad,) = _loss_and_grad(args, impl)
        assert loss.isnan()
        assert grad[:, 1].isnan().all()


@pytest.mark.parametrize(("case", "impl"), [(c, i) for c in (SMALL, COMPACT) for i in KERNELS], ids=str)
def test_contract(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    pred, img, hidden = args["pred"].detach(), args["img"], args["hidden"]
    config = (4, True, "mse", "cpq", [0.5, 0.4, 0.3], [0.2, 0.2, 0.3], 1e-6, 1.0)
    for grad in (True, False):
        torch.library.opcheck(torch.ops.mimfast.pixel_loss_fwd, (pred, img, hidden, *config, grad, impl))
    count, upstream = torch.tensor(6, device=device), torch.tensor(0.5, device=device)
    tensors = (torch.zeros_like(pred), pred, img, hidden, count, upstream)
    torch.library.opcheck(torch.ops.mimfast.pixel_loss_bwd, (*tensors, *config, True, impl))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("case", [SMALL, COMPACT], ids=str)
def test_compiles_without_a_graph_break(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(pred: Tensor) -> Tensor:
        return 0.5 * pixel_loss(pred, args["img"], args["hidden"], patch=4, impl=impl)

    x = args["pred"]
    (got,) = torch.autograd.grad(step(x), x)
    (want,) = torch.autograd.grad(0.5 * pixel_loss(x, args["img"], args["hidden"], patch=4, impl="ref"), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = pixel_loss(**args, impl=impl)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, pixel_loss(**args, impl=impl))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU")
def test_graph_capture_and_a_side_stream_give_the_same(device):
    args = make(Case(2, 64, 64, 16, "bf16"), device)
    want, (want_grad,) = _loss_and_grad(args, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loss_and_grad(args, "triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, (grad,) = _loss_and_grad(args, "triton")
    graph.replay()
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)


def _loss_and_grad(args: dict, impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = pixel_loss(**args, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, args["pred"])


BAD = [
    ({"img": torch.zeros(2, 3, 8, 10)}, r"img has 8 x 10 pixels, expected multiples of 4 because patches are 4 x 4"),
    ({"img": torch.zeros(2, 1, 8, 12)}, r"img has shape \(2, 1, 8, 12\), expected \(any, 3, any, any\) because"),
    ({"img": torch.zeros(2, 3, 8, 12, dtype=torch.int32)}, r"img has dtype int32, expected uint8 or float32 or"),
    (
        {"pred": torch.zeros(2, 6, 47)},
        r"pred has shape \(2, 6, 47\), expected \(2, 6, 48\) because 8/4 x 12/4 gives 6 patches",
    ),
    (
        {"pred": torch.zeros(2, 4, 48), "hidden": torch.zeros(2, 3, dtype=torch.int64)},
        r"pred has shape \(2, 4, 48\), expected \(2, 6, 48\) because 8/4 x .* one row for each of the 3 indices",
    ),
    ({"img": torch.zeros(2, 3, 0, 12)}, r"img has 0 x 12 pixels, expected multiples of 4 because"),
    (
        {"hidden": torch.tensor([[0, 1], [6, 2]]), "checked": True},
        r"hidden has index 6 in row 1, expected 0 to 5 because it names hidden patches of the image's 6",
    ),
    ({"hidden": torch.tensor([[-1, 1], [3, 2]]), "checked": True}, r"hidden has index -1 in row 0, expected 0 to 5"),
    (
        {"hidden": torch.tensor([[3, 1, 3], [3, 2, 1]]), "pred": torch.zeros(2, 3, 48), "checked": True},
        r"hidden has index 3 twice in row 0, expected distinct indices because",
    ),
    (
        {"pred": torch.zeros(2, 6, 48, dtype=torch.float16), "impl": "cpu"},
        r"impl has 'cpu', .* takes float32 and bfloat16 predictions and was given float16",
    ),
    ({"pred": torch.zeros(2, 6, 48, dtype=torch.int64)}, r"pred has dtype int64, expected float32 or"),
    ({"pred": torch.zeros(2, 6, 48, device="meta")}, r"img has device cpu, expected meta because pred is there"),
    ({"hidden": torch.zeros(2, 5, dtype=torch.bool)}, r"hidden has shape \(2, 5\), expected \(2, 6\) because"),
    ({"hidden": torch.zeros(2, 6)}, r"hidden has dtype float32, expected bool or int64 because"),
    ({"patch": 0}, r"patch has 0, expected 1 or more because"),
    ({"kind": "huber"}, r"kind has 'huber', expected 'mse' or 'l1' or 'smooth_l1' because"),
    ({"order": "cqp"}, r"order has 'cqp', expected 'pqc' or 'cpq' because a row has its colours last or first"),
    ({"beta": 0.0}, r"beta has 0.0, expected a number above 0 because"),
    ({"impl": "cuda"}, r"impl has 'cuda', expected one of 'auto', 'triton', 'cpu', 'ref' because"),
    (
        {"pred": torch.zeros(2, 6, 48, dtype=torch.float64), "impl": "triton"},
        r"impl has 'triton', .* because .* float64",
    ),
    (
        {"img": torch.zeros(2, 3, 8, 12, requires_grad=True), "impl": "triton"},
        r"because the kernel has no gradient for img",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="pixel_loss: .*" + message):
        pixel_loss(**make(SMALL) | change)
