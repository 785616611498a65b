"""window_attention: parity with the reference, with plain torch and timm, the contract, properties, messages."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops.window_attention import IMPLS, window_attention, window_attention_ref
from mimfast.testing import assert_close_to_ref, poisoned, skip_unless
from mimfast.testing.window_attention import BIG, CASES, Case, eager, make

WAYS = [impl for impl in IMPLS if impl != "cuda"]  # which takes half types only: test_window_attention_cuda.py
FUSED = [impl for impl in WAYS if impl != "ref"]
KERNELS = [impl for impl in FUSED if impl != "sdpa"]  # with operators of their own
# few windows, for Triton's interpreter
SMALL = Case(1, 8, 4, 2, 16, 4, 2)
PADDED = Case(1, 5, 3, 2, 16, 4, 2, pad="pad_then_roll", bias=True)
GROUPED = Case(1, 8, 4, 2, 16, 4, 2, groups=2)
IDS = ["whole", "padded", "grouped"]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", CASES + BIG, ids=str)
def test_value_and_gradient(case, impl, device):
    skip_unless(impl, device)
    if impl == "triton" and (case in BIG or (device == "cpu" and case.dtype == "bf16")):
        pytest.skip(
            "too large; or Triton's interpreter, which multiplies the bits of bfloat16 matrices, not their values"
        )
    # half types: torch's own rounding is that of the chain it runs in that type, not that of our float32 reference
    plain, args = window_attention_ref if case.dtype == "fp32" else eager, make(case, device)
    if impl == "sdpa" and case.dtype != "fp32":
        args["table"].requires_grad_(False)  # judged in test_window_attention_matrix.py
    with poisoned():
        assert_close_to_ref(partial(window_attention, impl=impl), plain, args)


@pytest.mark.parametrize("lanes", [8, 4])
@pytest.mark.parametrize("case", [c for c in CASES if c.layout == "plain"], ids=str)
def test_native_code_for_older_processors(case, lanes, monkeypatch, device):
    skip_unless("cpu", device)
    module = import_module("mimfast.ops.window_attention")
    monkeypatch.setattr(module, "run_cpu", partial(module.run_cpu, lanes=lanes))
    plain = window_attention_ref if case.dtype == "fp32" else eager
    with poisoned():
        assert_close_to_ref(partial(window_attention, impl="cpu"), plain, make(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "fp32" and c.layout == "plain"], ids=str)
def test_ref_agrees_with_the_model_written_out(case):
    args = make(case)
    torch.testing.assert_close(window_attention_ref(**args), eager(**args))


@pytest.mark.parametrize("pad", ["pad_then_roll", "roll_then_pad"])
def test_gradient_of_ref(pad):
    args = make(Case(1, 3, 2, 1, 2, 2, 1, pad=pad, bias=True))
    leaves = {k: v.detach().double().requires_grad_() for k, v in args.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in args.items() if k not in leaves}
    fn = lambda *tensors: window_attention_ref(**dict(zip(leaves, tensors)), **rest)  # noqa: E731
    assert torch.autograd.gradcheck(fn, tuple(leaves.values()))


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_table_gradient_by_finite_differences(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    (grad,) = torch.autograd.grad(window_attention(**args, impl=impl).square().sum(), args["table"])
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    for entry in (0, 17, 48):
        step = torch.zeros_like(wide["table"])
        step[entry, 1] = 1e-5
        up, down = (
            window_attention_ref(**wide | {"table": wide["table"] + s * step}).square().sum().item() for s in (1, -1)
        )
        assert grad[entry, 1].item() == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize(("size", "shift"), [((14, 7), 3), ((7, 14), 0), ((8, 9), 3)])
def test_agrees_with_timm(size, shift, impl, device):
    """The attention part of timm's block between two projections that are the identity."""
    skip_unless(impl, device)
    swin = pytest.importorskip("timm.models.swin_transformer")
    block = swin.SwinTransformerBlock(16, size, 1, window_size=7, shift_size=shift).to(device)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.nn.init.normal_(block.attn.qkv.bias)
    torch.nn.init.eye_(block.attn.proj.weight)
    torch.nn.init.zeros_(block.attn.proj.bias)
    x = torch.randn(1, *size, 16, device=device)
    params = (block.attn.qkv.weight, block.attn.qkv.bias, block.attn.relative_position_bias_table)
    moved = tuple(block.shift_size)  # a side of one window is not shifted there
    out = window_attention(
        block.attn.qkv(x), params[2], 7, moved, 1, pad="roll_then_pad", qkv_bias=params[1], impl=impl
    )
    want = block._attn(x)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(out, want)
    grads, wanted = (torch.autograd.grad(o, params, upstream) for o in (out, want))
    for got, expected in zip(grads, wanted):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_probabilities_add_up_to_one(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with torch.no_grad():
        args["qkv"].unflatten(-1, (3, -1))[..., 2, :] = 1.0
        if case.bias:
            args["qkv_bias"].view(3, -1)[2] = 1.0
        out = window_attention(**args, impl=impl)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("impl", WAYS)
def test_bias_gradients_of_a_query_cancel(impl, device):
    """Each row of probabilities keeps its sum, so its gradients, and with them those of a head's table, add up to 0."""
    skip_unless(impl, device)
    args = make(SMALL, device)
    (grad,) = torch.autograd.grad(window_attention(**args, impl=impl).square().sum(), args["table"])
    torch.testing.assert_close(grad.sum(0), torch.zeros(2, device=device), rtol=0, atol=1e-5 * grad.abs().sum().item())


@pytest.mark.parametrize("impl", WAYS)
def test_permuting_images_or_windows_permutes_the_result(impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(batch=3, heads=1, shift=0), device)
    images, rows = torch.tensor([2, 0, 1], device=device), torch.arange(8, device=device).roll(4)
    moved = args["qkv"].detach()[images][:, rows].requires_grad_()
    (want, want_grads), (got, got_grads) = (_run(a, impl, sum_of_squares) for a in (args, args | {"qkv": moved}))
    torch.testing.assert_close(got, want[images][:, rows])
    torch.testing.assert_close(got_grads[0], want_grads[0][images][:, rows])
    torch.testing.assert_close(got_grads[1], want_grads[1])


@pytest.mark.parametrize("impl", WAYS)
def test_without_a_mask_shift_is_a_roll_of_the_map(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device) | {"mask_value": 0.0}
    rolled = args["qkv"].roll((-2, -2), (1, 2))
    want = window_attention(**args | {"qkv": rolled, "shift": 0}, impl=impl).roll((2, 2), (1, 2))
    torch.testing.assert_close(window_attention(**args, impl=impl), want)


@pytest.mark.parametrize("impl", WAYS)
def test_an_infinite_mask_keeps_the_far_edges_apart(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device) | {"mask_value": float("-inf")}
    out = window_attention(**args, impl=impl)
    (grad,) = torch.autograd.grad(out[:, :2].sum(), args["qkv"])  # the first rows share windows with the last ones
    assert grad[:, :2].any()
    assert not grad[:, 2:].any()


@pytest.mark.parametrize("impl", WAYS)
def test_minus_100_is_not_infinite(impl, device):
    skip_unless(impl, device)
    args = make(Case(1, 4, 4, 1, 16, 4, 2), device)
    with torch.no_grad():
        args["table"].fill_(0.0)
        args["qkv"][..., :32] = 0.0
        args["qkv"][0, :, :, 0] = 40.0
        args["qkv"][0, 0, :, 16] = 40.0  # scores of 400 for the keys of one row alone: 300 across the mask
        got, want = (window_attention(**args, impl=i) for i in (impl, "ref"))
        apart = window_attention(**args | {"mask_value": float("-inf")}, impl=impl)
    torch.testing.assert_close(got, want)
    assert (got - apart).abs().max() > 0.1


@pytest.mark.parametrize("impl", WAYS)
def test_groups_do_not_see_each_other(impl, device):
    skip_unless(impl, device)
    args = make(GROUPED, device)
    second = args["group"] == 1
    other = args["qkv"].detach().clone()
    other[second] = torch.randn_like(other[second])
    (want, want_grads), (got, got_grads) = (_run(a, impl) for a in (args, args | {"qkv": other.requires_grad_()}))
    assert torch.equal(got[~second], want[~second])
    assert torch.equal(got_grads[0][~second], want_grads[0][~second])
    assert not torch.equal(got[second], want[second])


@pytest.mark.parametrize("impl", WAYS)
def test_one_group_is_no_group_and_names_do_not_matter(impl, device):
    skip_unless(impl, device)
    args = make(PADDED, device)
    ids = torch.randint(0, 2, (5, 3), device=device)
    one = args | {"group": torch.full_like(ids, 5, dtype=torch.uint8)}
    renamed = args | {"group": torch.where(ids == 0, 2**31 - 1, 2**31 - 2)[None]}
    for left, right in ((args, one), (args | {"group": ids.bool()}, renamed)):
        (want, want_grads), (got, got_grads) = (_run(a, impl) for a in (left, right))
        torch.testing.assert_close(got, want)
        for g, w in zip(got_grads, want_grads):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("impl", WAYS)
def test_padding_is_tokens_of_the_bias(impl, device):
    skip_unless(impl, device)
    args = make(PADDED, device)
    bias = args["qkv_bias"]
    grown = bias.expand(1, 8, 4, -1).clone()
    grown[:, :5, :3] = args["qkv"]
    want = window_attention(**args | {"qkv": grown, "pad": None, "qkv_bias": None}, impl=impl)[:, :5, :3]
    out = window_attention(**args, impl=impl)
    torch.testing.assert_close(out, want)
    leaves = (args["qkv"], args["table"], bias)
    for got, expected in zip(*(torch.autograd.grad(sum_of_squares(o), leaves) for o in (out, want))):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_two_runs_are_equal_to_the_bit(case, impl, device):
    skip_unless(impl, device)
    args, threads = make(case._replace(batch=1 if impl == "triton" else 5), device), torch.get_num_threads()
    out, grads = _run(args, impl)
    torch.set_num_threads(3)
    try:
        again, grads_again = _run(args, impl)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out, again)
    for grad, grad_again in zip(grads, grads_again):
        assert torch.equal(grad, grad_again)


def test_programs_of_the_kernel_walk_through_windows(monkeypatch, device):
    skip_unless("triton", device)
    kernels = import_module("mimfast.kernels.window_attention")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # five windows on one, or on two programs, of a head
    for heads, dtype in ((2, "fp32"), (1, "fp16")):
        case = Case(1, 9, 3, heads, 16, (2, 3), 1, dtype, pad="roll_then_pad", groups=2, bias=True)
        plain = window_attention_ref if dtype == "fp32" else eager
        with poisoned():
            assert_close_to_ref(partial(window_attention, impl="triton"), plain, make(case, device))


@pytest.mark.parametrize("impl", FUSED)
def test_gradient_of_any_layout(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    out = window_attention(**args, impl=impl)
    (want,) = torch.autograd.grad(window_attention(**args, impl="ref"), args["qkv"], torch.ones_like(out))
    upstreams = (torch.ones((), device=device).expand_as(out), torch.ones(1, 32, 8, 4, device=device).movedim(1, -1))
    for upstream in upstreams:
        (got,) = torch.autograd.grad(out, args["qkv"], upstream, retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", WAYS)
def test_no_image_at_all(impl, device):
    skip_unless(impl, device)
    out, grads = _run(make(SMALL._replace(batch=0), device), impl)
    assert out.shape == (0, 8, 4, 32)
    assert not grads[1].any()


@pytest.mark.parametrize("impl", WAYS)
def test_scale_and_one_token(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    want = window_attention_ref(**args, scale=0.5)
    torch.testing.assert_close(window_attention(**args, scale=0.5, impl=impl), want)
    single = make(SMALL._replace(rows=2, cols=2, window=1, shift=0), device)
    torch.testing.assert_close(window_attention(**single, impl=impl), single["qkv"][..., 64:])


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", [PADDED, GROUPED], ids=IDS[1:])
def test_contract(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    group = args["group"].int() if case.groups else None
    tensors = [None if x is None else x.detach() for x in (args["qkv"], args["table"], args.get("qkv_bias"), group)]
    config = (*tensors, [4, 4], [2, 2], 2, 0.25, "pad_then_roll", -100.0, impl)
    torch.library.opcheck(torch.ops.mimfast.window_attention_fwd, config)
    grad = torch.randn(*tensors[0].shape[:-1], 32, device=device)
    torch.library.opcheck(torch.ops.mimfast.window_attention_bwd, (grad, *config))


@pytest.mark.parametrize("impl", ["auto", *WAYS])
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_compiles_without_a_graph_break(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    rest = {k: v for k, v in args.items() if k != "qkv"}
    torch._dynamo.reset()  # or the cases together hit its limit of recompilations

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(qkv: Tensor) -> Tensor:
        return 0.5 * window_attention(qkv, **rest, impl=impl)

    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    got = torch.autograd.grad(step(args["qkv"]).square().sum(), leaves)
    want = torch.autograd.grad((0.5 * window_attention(**args, impl="ref")).square().sum(), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("impl", WAYS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = window_attention(**args, impl=impl)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, window_attention(**args, impl=impl))


def sum_of_squares(out: Tensor) -> Tensor:
    return out.square().sum()


def _run(args: dict, impl: str, loss=Tensor.sum) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = window_attention(**args, impl=impl)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    return out.detach(), torch.autograd.grad(loss(out), leaves)


BAD = [
    (
        {"qkv": torch.zeros(2, 96, 96)},
        r"qkv has shape \(2, 96, 96\), expected \(any, any, any, any\) because it is \(ba",
    ),
    ({"qkv": torch.zeros(2, 8, 12, 96).int()}, r"qkv has dtype int32, expected float32 or"),
    ({"qkv": torch.zeros(2, 8, 12, 97)}, r"heads has 2, expected a divisor of 97 / 3 because q, k and v are split"),
    ({"heads": 0}, r"heads has 0, expected a divisor of 96 / 3"),
    ({"window": 0}, r"window has 0 x 0, expected 1 or more tokens a side"),
    (
        {"window": 5},
        r"window has 5 x 5, expected a divisor of the map, or pad='pad_then_roll' or .* map has 8 x 12 tok",
    ),
    ({"shift": 4}, r"shift has 4 x 4, expected 0 to 3 and 0 to 3 because the roll moves a window of 4 x 4"),
    ({"shift": (0, -1)}, r"shift has 0 x -1, expected 0 to 3 and 0 to 3"),
    ({"pad": "pad"}, r"pad has 'pad', expected None or 'pad_then_roll' or 'roll_then_pad' because"),
    ({"mask_value": 1.0}, r"mask_value has 1.0, expected 0 or less because"),
    ({"mask_value": float("nan")}, r"mask_value has nan, expected 0 or less"),
    (
        {"table": torch.zeros(48, 2)},
        r"table has shape \(48, 2\), expected \(49, 2\) because tokens of a 4 x 4 window are 7 x 7 offsets apart",
    ),
    ({"table": torch.zeros(49, 2).int()}, r"table has dtype int32, expected"),
    ({"table": torch.zeros(49, 2, device="meta")}, r"table has device meta, expected cpu because qkv is there"),
    ({"qkv_bias": torch.zeros(32)}, r"qkv_bias has shape \(32,\), expected \(96\) because it is the bias of the proj"),
    ({"group": torch.zeros(8, 12)}, r"group has dtype float32, expected int64 or"),
    ({"group": torch.zeros(8, 8).int()}, r"group has shape \(8, 8\), expected \(8, 12\) because it is one id for each"),
    ({"group": torch.zeros(3, 8, 12).int()}, r"group has shape \(3, 8, 12\), expected \(2, 8, 12\) because"),
    ({"group": torch.full((8, 12), -1), "checked": True}, r"group has id -1, expected 0 to 2147483647 because ids are"),
    ({"group": torch.full((8, 12), 2**31), "checked": True}, r"group has id 2147483648, expected 0 to 2147483647"),
    ({"impl": "flash"}, r"impl has 'flash', expected one of 'auto', "),
    ({"qkv": torch.zeros(2, 8, 12, 96).double(), "impl": "cpu"}, r"impl has 'cpu', .* given float64"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="window_attention: .*" + message):
        window_attention(**make(SMALL._replace(batch=2, cols=12)) | change)


def test_good_group_ids_pass_the_check():
    args = make(GROUPED)
    assert torch.equal(window_attention(**args, checked=True), window_attention(**args))
