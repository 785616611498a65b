"""window_attention_v2: what differs from window_attention; the rest is tested there."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops.window_attention_v2 import IMPLS, window_attention_v2, window_attention_v2_ref
from mimfast.testing import assert_close_to_ref, compare, poisoned, skip_unless
from mimfast.testing.window_attention_v2 import BIG, CASES, Case, eager, make

WAYS = [impl for impl in IMPLS if impl != "cuda"]  # which takes half types only: test_window_attention_v2_cuda.py
FUSED = [impl for impl in WAYS if impl != "ref"]
KERNELS = [impl for impl in FUSED if impl != "sdpa"]  # with operators of their own
SMALL = Case(1, 8, 4, 2, 16, 4, 2)
PADDED = Case(1, 5, 3, 2, 16, 4, 2, pad="pad_then_roll", bias=True)
GROUPED = Case(1, 8, 4, 2, 16, 4, 2, groups=2)
IDS = ["whole", "padded", "grouped"]
# for the interpreter, which takes a second for each: one or two launches, one or two halves of the keys, both pads
FEW = [c for c in CASES if str(c) in (
    "1x8x4-3x16-w4-s2-fp32", "1x7x7-1x32-w7-s0-fp32", "1x12x12-1x16-w12-s6-fp32", "1x7x7-1x64-w7-s0-fp16",
    "1x14x14-1x32-w14-s7-fp16-2 groups", "1x5x6-1x32-w7-s3-fp32-pad_then_roll-bias",
    "1x6x9-1x16-w4-s2-fp32-roll_then_pad-bias",
)]  # fmt: skip
assert len(FEW) == 7


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", CASES + BIG, ids=str)
def test_value_and_gradient(case, impl, device):
    skip_unless(impl, device)
    if impl == "triton" and (case in BIG or (device == "cpu" and case.dtype == "bf16")):
        pytest.skip(
            "too large; or Triton's interpreter, which multiplies the bits of bfloat16 matrices, not their values"
        )
    args = make(case, device)
    args["logit_scale"].requires_grad_(False)  # one number for a head, and its error is luck: judged below
    plain = window_attention_v2_ref if case.dtype == "fp32" else eager
    with poisoned():
        assert_close_to_ref(partial(window_attention_v2, impl=impl), plain, args)


@pytest.mark.parametrize("lanes", [8, 4])
@pytest.mark.parametrize("case", [*FEW, BIG[0]], ids=str)
def test_native_code_for_older_processors(case, lanes, monkeypatch, device):
    skip_unless("cpu", device)
    module = import_module("mimfast.ops.window_attention_v2")
    monkeypatch.setattr(module, "run_cpu", partial(module.run_cpu, lanes=lanes))
    args = make(case)
    args["logit_scale"].requires_grad_(False)
    plain = window_attention_v2_ref if case.dtype == "fp32" else eager
    with poisoned():
        assert_close_to_ref(partial(window_attention_v2, impl="cpu"), plain, args)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED, *BIG[:2]], ids=str)
def test_gradient_of_logit_scale(case, impl, device):
    """The tolerance rule for the root mean square over several upstream gradients."""
    skip_unless(impl, device)
    if impl == "triton" and case in BIG:
        pytest.skip("too large")
    args, errors = make(case, device), []
    for seed in range(2 if impl == "triton" else 16):
        found = compare(partial(window_attention_v2, impl=impl), window_attention_v2_ref, args, seed)
        errors += [(e.kernel, e.torch, e.allowed - 2 * e.torch) for e in found if "logit_scale" in e.name]
    kernel, torchs, noise = torch.tensor(errors).square().mean(0).sqrt().tolist()
    print(f"kernel {kernel:.3e}, torch {torchs:.3e}, noise {noise:.3e}")
    assert len(errors) > 1
    assert kernel <= 2 * torchs + noise


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "fp32" and c.layout == "plain"], ids=str)
def test_ref_agrees_with_the_model_written_out(case):
    args = {k: v.detach() if isinstance(v, Tensor) else v for k, v in make(case).items()}
    leaves = {
        k: v.double().requires_grad_() for k, v in args.items() if isinstance(v, Tensor) and v.dtype.is_floating_point
    }
    out, want = (fn(**args | leaves) for fn in (window_attention_v2_ref, eager))
    torch.testing.assert_close(out, want)
    if case.pad and not case.bias:
        return  # normalize gives zeros a gradient of 1e12
    for got, expected in zip(*(torch.autograd.grad(o.square().sum(), list(leaves.values())) for o in (out, want))):
        torch.testing.assert_close(got, expected)


def test_gradient_of_ref():
    args = make(Case(1, 3, 2, 1, 2, 2, 1, pad="roll_then_pad", bias=True))
    leaves = {k: v.detach().double().requires_grad_() for k, v in args.items() if isinstance(v, Tensor)}
    rest = {k: v for k, v in args.items() if k not in leaves}
    fn = lambda *tensors: window_attention_v2_ref(**dict(zip(leaves, tensors)), **rest)  # noqa: E731
    assert torch.autograd.gradcheck(fn, tuple(leaves.values()))


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_gradients_of_table_and_logit_scale_by_finite_differences(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    grads = torch.autograd.grad(
        window_attention_v2(**args, impl=impl).square().sum(), (args["table"], args["logit_scale"])
    )
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    entries = [("table", (0, 1)), ("table", (17, 0)), ("table", (48, 1)), ("logit_scale", (0, 0, 0))]
    for name, entry in entries:
        step = torch.zeros_like(wide[name])
        step[entry] = 1e-5
        up, down = (
            window_attention_v2_ref(**wide | {name: wide[name] + s * step}).square().sum().item() for s in (1, -1)
        )
        grad = grads[name == "logit_scale"][entry].item()
        assert grad == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize(("size", "shift"), [((8, 8), 2), ((6, 9), 2)])
def test_agrees_with_timm(size, shift, impl, device):
    skip_unless(impl, device)
    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    block = swin.SwinTransformerV2Block(16, size, 1, window_size=4, shift_size=shift).to(device)
    attn = block.attn
    torch.nn.init.normal_(attn.q_bias)
    torch.nn.init.normal_(attn.v_bias)
    torch.nn.init.eye_(attn.proj.weight)
    torch.nn.init.zeros_(attn.proj.bias)
    x = torch.randn(1, *size, 16, device=device)
    params = (attn.qkv.weight, attn.logit_scale, *attn.cpb_mlp.parameters())
    table = 16 * attn.cpb_mlp(attn.relative_coords_table).view(-1, 1).sigmoid()
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = torch.nn.functional.linear(x, attn.qkv.weight, bias)
    out = window_attention_v2(qkv, table, attn.logit_scale, 4, shift, 1, pad="roll_then_pad", qkv_bias=bias, impl=impl)
    want = block._attn(x)
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(want)
    for got, expected in zip(*(torch.autograd.grad(o, params, upstream) for o in (out, want))):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", WAYS)
def test_logit_scale_is_clamped_and_has_no_gradient_above(impl, device):
    skip_unless(impl, device)
    args, top = make(SMALL, device), math.log(100.0)
    results = {}
    for value in (top - 0.1, top, top + 3.0):
        scale = torch.full((2,), value, device=device, requires_grad=True)
        out = window_attention_v2(**args | {"logit_scale": scale}, impl=impl)
        results[value] = out.detach(), torch.autograd.grad(out.square().sum(), scale)[0]
    torch.testing.assert_close(results[top][0], results[top + 3.0][0])
    assert results[top - 0.1][1].all()
    assert not results[top + 3.0][1].any()


@pytest.mark.parametrize("impl", WAYS)
def test_only_the_direction_of_queries_and_keys_counts(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    parts = torch.tensor([1e3, 1e-3, 1.0], device=device)[:, None]
    longer = (args["qkv"].detach().unflatten(-1, (3, -1)) * parts).flatten(-2).requires_grad_()
    (want, want_grads), (got, got_grads) = (_run(a, impl) for a in (args, args | {"qkv": longer}))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    scaled = (got_grads[0].unflatten(-1, (3, -1)) * parts).flatten(-2)
    torch.testing.assert_close(scaled, want_grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", WAYS)
def test_zero_rows_have_no_gradient_and_make_no_nan(impl, device):
    skip_unless(impl, device)
    args = make(PADDED, device)
    with torch.no_grad():
        args["qkv"].unflatten(-1, (3, -1))[0, 0, 0, :2] = 0.0
        args["qkv_bias"].view(3, -1)[1] = 0.0  # as in Swin V2
    with poisoned():
        out, grads = _run(args, impl)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0].unflatten(-1, (3, -1))[0, 0, 0, :2].any()
    assert grads[0].unflatten(-1, (3, -1))[0, 0, 0, 2].any()
    names = [k for k, v in args.items() if isinstance(v, Tensor) and v.requires_grad]
    d_bias = grads[names.index("qkv_bias")].view(3, -1)
    assert not d_bias[:2].any()
    assert d_bias[2].any()


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_near_100_stay_exact(dtype, impl, device):
    """In half types too only the result is rounded, so that all agree with fp64 on the same inputs."""
    skip_unless(impl, device)
    if impl == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices, not their values")
    args = make(SMALL._replace(shift=0), device)
    args["logit_scale"] = torch.full((2,), math.log(100.0), device=device)
    args["qkv"] = args["qkv"].detach().to(dtype)
    want = window_attention_v2(**args | {"qkv": args["qkv"].double()}, impl="ref")
    out = window_attention_v2(**args, impl=impl)
    bits = max(torch.finfo(dtype).eps, 2e-5)  # of float32 scores of 100: a step is 8e-6
    torch.testing.assert_close(out.double(), want, rtol=2 * bits, atol=2 * bits)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", [SMALL, PADDED, GROUPED], ids=IDS)
def test_two_runs_are_equal_to_the_bit(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    (out, grads), (again, grads_again) = _run(args, impl), _run(args, impl)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", [PADDED, GROUPED], ids=IDS[1:])
def test_contract(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    group = args["group"].int() if case.groups else None
    tensors = [None if x is None else x.detach() for x in (args["qkv"], args["table"], args.get("qkv_bias"))]
    config = (*tensors, torch.ones(2, device=device), group, [4, 4], [2, 2], 2, "pad_then_roll", -100.0, impl)
    torch.library.opcheck(torch.ops.mimfast.window_attention_v2_fwd, config)
    grad = torch.randn(*tensors[0].shape[:-1], 32, device=device)
    torch.library.opcheck(torch.ops.mimfast.window_attention_v2_bwd, (grad, *config))


@pytest.mark.parametrize("impl", ["auto", *WAYS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    args = make(PADDED, device)
    rest = {k: v for k, v in args.items() if k != "qkv"}
    torch._dynamo.reset()

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(qkv: Tensor) -> Tensor:
        return 0.5 * window_attention_v2(qkv, **rest, impl=impl)

    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    got = torch.autograd.grad(step(args["qkv"]).square().sum(), leaves)
    want = torch.autograd.grad((0.5 * window_attention_v2(**args, impl="ref")).square().sum(), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", WAYS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = window_attention_v2(**args, impl=impl)
    assert torch.equal(inside, window_attention_v2(**args, impl=impl))


def _run(args: dict, impl: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = window_attention_v2(**args, impl=impl)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)


BAD = [
    ({"logit_scale": torch.zeros(3)}, r"logit_scale has shape \(3,\), expected \(2\) or \(2, 1, 1\) because each of"),
    ({"logit_scale": torch.zeros(2).int()}, r"logit_scale has dtype int32, expected float32 or"),
    ({"logit_scale": torch.zeros(2, device="meta")}, r"logit_scale has device meta, expected cpu because"),
    ({"table": torch.zeros(48, 2)}, r"table has shape \(48, 2\), expected \(49, 2\) because tokens of a 4 x 4 window"),
    ({"window": 5}, r"window has 5 x 5, expected a divisor of the map"),
    ({"group": torch.full((8, 4), -1), "checked": True}, r"group has id -1, expected 0 to 2147483647"),
    ({"qkv": torch.zeros(1, 8, 4, 96).double(), "impl": "cpu"}, r"impl has 'cpu', .* given float64"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="window_attention_v2: .*" + message):
        window_attention_v2(**make(SMALL) | change)


@pytest.mark.parametrize("impl", FUSED)
def test_rows_without_a_norm_have_no_gradient_in_float16(impl, device):
    """The key of padding is 0 in Swin V2; and so may be those of tokens."""
    skip_unless(impl, device)
    args = make(Case(1, 5, 6, 2, 32, 4, 2, "fp16", "roll_then_pad", bias=True), device)
    with torch.no_grad():
        args["qkv_bias"].view(3, -1)[1] = 0.0
        args["qkv"][0, 2, 3] = 0.0
    out = window_attention_v2(**args, impl=impl)
    grads = torch.autograd.grad(out.float().square().sum(), (args["qkv"], args["qkv_bias"], args["logit_scale"]))
    assert all(torch.isfinite(x).all() for x in (out, *grads))
