"""hog_loss: parity with the reference, the reference against hog, the contract, properties, messages."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast._images import IMAGENET_STD
from mimfast.ops import _losses
from mimfast.ops.hog import hog, hog_ref
from mimfast.ops.hog_loss import IMPLS, hog_loss, hog_loss_ref, run_gpu, run_native
from mimfast.testing import assert_close_to_ref, emulated, poisoned, skip_unless
from mimfast.testing.hog_loss import CASES, Case, as_cells, make, usual

SMALL = Case(2, 32, 48, 16)
LAYOUTS = [SMALL, SMALL._replace(hidden="compact", ratio=0.5), SMALL._replace(hidden="parts")]
KERNELS = [impl for impl in IMPLS if impl != "ref"]
WAYS = ["emulated", *IMPLS]


class _Emulated(torch.autograd.Function):
    """The CUDA kernel on the CPU, its gradient for an upstream of 1 corrected or computed anew as `stale` says."""

    @staticmethod
    def forward(ctx, pred, inputs, stale):
        loss, d_pred, count = run_gpu(emulated.core(), (pred, *inputs), not stale)
        ctx.save_for_backward(d_pred if not stale else torch.full_like(pred, float("nan")), pred, count)
        ctx.inputs, ctx.stale = inputs, stale
        return loss

    @staticmethod
    def backward(ctx, upstream):
        d_pred, pred, count = ctx.saved_tensors
        inputs = (pred, *ctx.inputs)
        run_native(emulated.core(), "cuda", inputs, upstream.float(), None, d_pred, count, ctx.stale)
        return d_pred, None, None


def run(impl: str, pred: Tensor, img: Tensor, hidden: Tensor, patch: int, stale: bool = False, **rest) -> Tensor:
    """hog_loss, also by the emulated CUDA kernel."""
    if impl != "emulated":
        return hog_loss(pred, img, hidden, patch=patch, impl=impl, **rest)
    if not _losses.compact(pred, hidden):
        hidden = _losses.hidden_map(hidden, (img.shape[2] // patch) * (img.shape[3] // patch))
    config = [rest.get(k, v) for k, v in (("cell", 8), ("normalize", True), ("kind", "mse"), ("beta", 1.0))]
    config += [rest.get("gaussian_window", 0), list(IMAGENET_STD)]
    return _Emulated.apply(pred, (img, hidden, patch, *config), stale)


def where(impl: str, device: str) -> str:
    """The device an implementation runs on, or a skip."""
    if impl == "emulated":
        if emulated.why_not() is not None:
            pytest.skip(emulated.why_not())
        return "cpu"
    skip_unless(impl, device)
    return device


def _loss_and_grad(args: dict, impl: str) -> tuple[Tensor, Tensor]:
    loss = run(impl, **args)
    return loss.detach(), torch.autograd.grad(loss, args["pred"])[0]


@pytest.mark.parametrize("impl", [way for way in WAYS if way != "ref"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case, impl, device):
    args = make(case, where(impl, device))
    with poisoned():
        assert_close_to_ref(partial(run, impl), hog_loss_ref, args)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [*LAYOUTS, Case(1, 32, 64, 32, hidden="halves", normalize=False)], ids=str)
def test_agrees_with_the_formula_written_out(case, impl, device):
    args = make(case._replace(kind="l1"), where(impl, device))
    target = hog_ref(args["img"], stride=case.patch, normalize=case.normalize).double()
    u, grid, total, count = case.patch // 8, (case.height // case.patch, case.width // case.patch), 0.0, 0
    for b in range(case.batch):
        for row, token in enumerate(args["hidden"][b].tolist() if case.hidden == "compact" else range(target.shape[1])):
            whole = case.hidden == "compact"
            cells = range(u * u) if whole else as_cells(args["hidden"], grid, u)[b, token].nonzero().flatten().tolist()
            for at in (k * u * u + cell for k in range(27) for cell in cells):
                total += abs(args["pred"][b, row, at].item() - target[b, token, at].item())
                count += 1
    assert run(impl, **args).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_close_to_the_usual_layer(case, impl, device):
    args = make(case, where(impl, device))
    assert run(impl, **args).item() == pytest.approx(usual(**args).item(), rel=2e-3)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_predicting_hog_itself_costs_nothing(case, impl, device):
    args = make(case, where(impl, device))
    rows = args["hidden"] if case.hidden == "compact" else None
    args["pred"] = hog(args["img"], stride=16, hidden=rows).requires_grad_()
    loss, grad = _loss_and_grad(args, impl)
    assert loss.item() == 0
    assert not grad.any()


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_constant_images_have_targets_of_zero(case, impl, device):
    args = make(case._replace(picture="flat"), where(impl, device))
    loss, grad = _loss_and_grad(args, impl)
    zeros = {"target": torch.zeros_like(args["pred"])}
    counts = args["hidden"] if case.hidden == "map" else torch.ones(args["pred"].shape[:2], dtype=torch.bool)
    if case.hidden == "parts":
        counts = as_cells(args["hidden"], (2, 3), 2).repeat(1, 1, 27)
    counts = counts.to(loss.device).view(2, -1, counts.shape[2] if counts.dim() == 3 else 1)
    want = _losses.mean_loss(args["pred"], zeros["target"], counts, "mse", 1.0)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(want, args["pred"])[0])


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [LAYOUTS[0], LAYOUTS[2], Case(2, 32, 64, 32, hidden="halves")], ids=str)
def test_predictions_of_what_is_visible_do_not_matter(case, impl, device):
    args = make(case, where(impl, device))
    u, grid = case.patch // 8, (case.height // case.patch, case.width // case.patch)
    visible = ~as_cells(args["hidden"], grid, u).repeat(1, 1, 27)
    spoilt = dict(args, pred=args["pred"].detach().masked_fill(visible, float("nan")).requires_grad_())
    with poisoned():
        loss, grad = _loss_and_grad(spoilt, impl)
    want, want_grad = _loss_and_grad(args, impl)
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)
    assert not grad[visible].any()


@pytest.mark.parametrize("impl", WAYS)
def test_nothing_hidden_costs_nothing(impl, device):
    args = make(SMALL, where(impl, device))
    empty = torch.empty(2, 0, dtype=torch.int64, device=args["img"].device)
    for hidden in (torch.zeros_like(args["hidden"]), empty - 1, torch.full_like(empty, -1).new_full((2, 3), -1)):
        loss, grad = _loss_and_grad(args | {"hidden": hidden}, impl)
        assert loss.item() == 0
        assert not grad.any()


@pytest.mark.parametrize("impl", WAYS)
def test_indices_mean_the_same_as_the_map(impl, device):
    args = make(SMALL._replace(ratio=0.5), where(impl, device))
    indices = args["hidden"].nonzero()[:, 1].view(2, -1).flip(-1)
    loss, grad = _loss_and_grad(args, impl)
    beyond = torch.tensor([[-1, 6], [2**62, -(2**62)]], device=indices.device)
    padded = torch.cat([indices[:, :2], beyond, indices], 1)  # twice is once here, and out of range is nothing
    for hidden in (padded, indices.repeat(1, 3)):
        got = _loss_and_grad(args | {"hidden": hidden}, impl)
        assert torch.equal(got[0], loss)
        assert torch.equal(got[1], grad)
    picked = args["pred"].detach().gather(1, indices[..., None].expand(-1, -1, 108)).requires_grad_()
    got = _loss_and_grad(args | {"hidden": indices, "pred": picked}, impl)
    torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=0)
    assert torch.equal(got[1], grad.gather(1, indices[..., None].expand_as(picked)))


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("beyond", [-1, 6, 2**62])
def test_rows_of_indices_out_of_range_count_for_nothing(beyond, impl, device):
    args = make(LAYOUTS[1], where(impl, device))
    args["hidden"][0, 1] = beyond
    pred = args["pred"].detach()
    pred[0, 1] = float("nan")
    args["pred"] = pred.requires_grad_()
    with poisoned():
        loss, grad = _loss_and_grad(args, impl)
    assert not grad[0, 1].any()
    assert grad.isfinite().all()
    rest = {k: torch.cat([args[k][0, [0, 2]], args[k][1]]) for k in ("pred", "hidden")}
    target = hog_ref(args["img"], stride=16)
    picked = torch.cat([target[0, rest["hidden"][:2]], target[1, rest["hidden"][2:]]])
    torch.testing.assert_close(loss, (rest["pred"] - picked).square().mean().detach())


@pytest.mark.parametrize("impl", WAYS)
def test_a_map_of_whole_tokens_means_the_same_on_any_grid(impl, device):
    args = make(Case(2, 32, 64, 32, ratio=0.5), where(impl, device))
    loss, grad = _loss_and_grad(args, impl)
    for v in (2, 4):
        fine = args["hidden"].view(2, 1, 2).repeat_interleave(v, 1).repeat_interleave(v, 2).flatten(1)
        got = _loss_and_grad(args | {"hidden": fine}, impl)
        torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1], grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("pred", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", [*KERNELS, "emulated"])
def test_backward_twice_gives_the_same_and_leaves_the_first_alone(impl, pred, upstream, device):
    args = make(SMALL._replace(pred=pred), where(impl, device))
    x = args["pred"]
    (want,) = torch.autograd.grad(upstream * hog_loss_ref(**args), x)
    (fresh,) = torch.autograd.grad(upstream * run(impl, **args), x)
    loss = run(impl, **args, **({"stale": True} if impl == "emulated" else {}))
    (first,) = torch.autograd.grad(upstream * loss, x, retain_graph=True)
    first = first.clone()
    (other,) = torch.autograd.grad(3 * upstream * loss, x, retain_graph=True)
    torch.testing.assert_close(other, 3 * want)
    (last,) = torch.autograd.grad(upstream * loss, x)
    assert torch.equal(first, last)
    assert torch.equal(first, fresh)
    torch.testing.assert_close(first, want)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_threads_change_nothing(case):
    skip_unless("cpu", "cpu")
    args, before, found = make(case._replace(batch=8, height=128, width=144)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(_loss_and_grad(args, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f[0], found[0][0]) and torch.equal(f[1], found[0][1]) for f in found)


@pytest.mark.parametrize("impl", KERNELS)
def test_prediction_without_gradient(impl, device):
    args = make(SMALL, where(impl, device))
    want = hog_loss(**args, impl=impl)
    assert torch.equal(hog_loss(**args | {"pred": args["pred"].detach()}, impl=impl), want)
    with torch.no_grad():
        loss = hog_loss(**args, impl=impl)
    assert torch.equal(loss, want)
    assert not loss.requires_grad


@pytest.mark.parametrize("impl", [*KERNELS, "emulated"])
@pytest.mark.parametrize("kind", _losses.KINDS)
def test_nan_in_a_hidden_token_is_not_hushed_up(kind, impl, device):
    args = make(LAYOUTS[1]._replace(kind=kind), where(impl, device))
    args["pred"] = args["pred"].detach().clone()
    args["pred"][:, 1] = float("nan")
    args["pred"].requires_grad_()
    loss, grad = _loss_and_grad(args, impl)
    assert loss.isnan()
    assert grad[:, 1].isnan().all()


def test_no_target_is_stored():
    skip_unless("cpu", "cpu")
    args = make(Case(8, 64, 64))
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            shapes.extend(tuple(o.shape) for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, Tensor))
            return out

    with Watch():
        _loss_and_grad(args, "cpu")
    assert sum(shape == (8, 16, 108) for shape in shapes) <= 2  # the gradient, handed out once


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_contract(case, impl, device):
    args = make(case, where(impl, device))
    pred, img, hidden = args["pred"].detach(), args["img"], args["hidden"]
    config = (16, 8, True, "mse", 1.0, 0, [0.2, 0.2, 0.3])
    for grad in (True, False):
        torch.library.opcheck(torch.ops.mimfast.hog_loss_fwd, (pred, img, hidden, *config, grad, impl))
    count, upstream = torch.tensor(6, device=device), torch.tensor(0.5, device=device)
    tensors = (torch.zeros_like(pred), pred, img, hidden, count, upstream)
    torch.library.opcheck(torch.ops.mimfast.hog_loss_bwd, (*tensors, *config, True, impl))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_compiles_without_a_graph_break(case, impl, device):
    args = make(case, where(impl, device) if impl != "auto" else device)

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(pred: Tensor) -> Tensor:
        return 0.5 * hog_loss(pred, args["img"], args["hidden"], patch=16, impl=impl)

    x = args["pred"]
    (got,) = torch.autograd.grad(step(x), x)
    (want,) = torch.autograd.grad(0.5 * hog_loss_ref(x, args["img"], args["hidden"], patch=16), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    args = make(SMALL, where(impl, device))
    with torch.autocast(device, torch.bfloat16):
        inside = hog_loss(**args, impl=impl)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, hog_loss(**args, impl=impl))


def test_float_compat_takes_normalised_images_and_other_bins():
    img, pred = torch.randn(1, 3, 16, 32), torch.randn(1, 2, 3 * 6 * 4)
    hidden = torch.tensor([[True, False]])
    got = hog_loss(pred, img, hidden, patch=16, bins=6, compat="float")
    want = (pred[:, 0] - hog_ref(img, stride=16, bins=6, compat="float")[:, 0]).square().mean()
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU")
def test_graph_capture_gives_the_same(device):
    args = make(Case(2, 64, 64, 16, "bf16"), device)
    want, want_grad = _loss_and_grad(args, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _loss_and_grad(args, "cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = _loss_and_grad(args, "cuda")
    graph.replay()
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad)


U8 = torch.uint8
BAD = [
    (
        {"img": torch.zeros(2, 3, 32, 44, dtype=U8)},
        r"img has 32 x 44 pixels, expected multiples of 8 because cells are",
    ),
    (
        {"img": torch.zeros(2, 3, 32, 40, dtype=U8)},
        r"img has 32 x 40 pixels, expected multiples of 16 because tokens are",
    ),
    (
        {"img": torch.zeros(2, 1, 32, 48, dtype=U8)},
        r"img has shape \(2, 1, 32, 48\), expected \(any, 3, any, any\) because",
    ),
    ({"img": torch.zeros(2, 3, 32, 48)}, r"img has dtype float32, expected uint8 because .* compat='float' takes"),
    ({"patch": 12}, r"patch has 12, expected a multiple of 8 because a token is made of whole cells of 8 pixels"),
    ({"patch": 4}, r"patch has 4, expected a multiple of 8"),
    ({"bins": 8}, r"bins has 8, expected 9 because the half-plane tests"),
    (
        {"pred": torch.zeros(2, 6, 107)},
        r"pred has shape \(2, 6, 107\), expected \(2, 6, 108\) because 32/16 x 48/16 gives 6 tokens of 2 x 2 cells",
    ),
    (
        {"pred": torch.zeros(2, 4, 108), "hidden": torch.zeros(2, 3, dtype=torch.int64)},
        r"pred has shape \(2, 4, 108\), expected \(2, 6, 108\) .* one row for each of the 3 indices",
    ),
    (
        {"hidden": torch.zeros(2, 5, dtype=torch.bool)},
        r"hidden has 5 entries for an image, expected one of 6, 24 because",
    ),
    ({"hidden": torch.zeros(2, 54, dtype=torch.bool)}, r"hidden has 54 entries for an image, expected one of 6, 24"),
    ({"hidden": torch.zeros(1, 6, dtype=torch.bool)}, r"hidden has shape \(1, 6\), expected \(2, any\) because"),
    ({"hidden": torch.zeros(2, 6)}, r"hidden has dtype float32, expected bool or int64 because"),
    (
        {"hidden": torch.tensor([[0, 1], [6, 2]]), "checked": True},
        r"hidden has index 6 in row 1, expected 0 to 5 because it names hidden patches of the image's 6",
    ),
    (
        {"hidden": torch.tensor([[3, 1, 3], [3, 2, 1]]), "pred": torch.zeros(2, 3, 108), "checked": True},
        r"hidden has index 3 twice in row 0, expected distinct indices because",
    ),
    ({"kind": "huber"}, r"kind has 'huber', expected 'mse' or 'l1' or 'smooth_l1' because"),
    ({"beta": 0.0}, r"beta has 0.0, expected a number above 0 because"),
    ({"gaussian_window": 5}, r"gaussian_window has 5, expected 0, or a divisor of the sides"),
    ({"compat": "exact"}, r"compat has 'exact', expected 'integer' or 'float' because"),
    ({"compat": "float", "impl": "cpu"}, r"impl has 'cpu', .* because the kernels compute with integer gradients"),
    ({"pred": torch.zeros(2, 6, 108, dtype=torch.float16), "impl": "cpu"}, r"impl has 'cpu', .* was given float16"),
    ({"pred": torch.zeros(2, 6, 108, dtype=torch.float64), "impl": "cpu"}, r"impl has 'cpu', .* float64"),
    ({"pred": torch.zeros(2, 6, 108, device="meta")}, r"img has device cpu, expected meta because pred is there"),
    ({"impl": "sdpa"}, r"impl has 'sdpa', expected one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    args = {"pred": torch.zeros(2, 6, 108), "img": torch.zeros(2, 3, 32, 48, dtype=U8), "patch": 16}
    args["hidden"] = torch.zeros(2, 6, dtype=torch.bool)
    with pytest.raises(UserError, match="hog_loss: .*" + message):
        hog_loss(**args | change)
