"""short_attention: parity with the reference, the reference itself, the contract, properties, messages."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops.short_attention import IMPLS, short_attention, short_attention_ref
from mimfast.testing import assert_close_to_ref, poisoned, skip_unless
from mimfast.testing.short_attention import CASES, Case, eager, make

FUSED = [impl for impl in IMPLS if impl != "ref"]
SMALL, PACKED = Case(2, 7, 2, 16), Case(0, 0, 2, 16, lengths=(3, 0, 9, 1), behind=2)
IDS = ["fixed", "packed"]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case, impl, device):
    skip_unless(impl, device)
    if case.dtype == "bf16" and impl == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices, not their values")
    if case.dtype == "fp16" and impl == "cpu":
        case = case._replace(dtype="bf16")  # the same shapes in the half type that it takes
    # half types: torch's own rounding is that of the chain it runs in that type, not that of our float32 reference
    plain = short_attention_ref if case.dtype == "fp32" else eager
    with poisoned():
        assert_close_to_ref(partial(short_attention, impl=impl), plain, make(case, device))


@pytest.mark.parametrize("case", [SMALL, PACKED, CASES[-1], CASES[-2]], ids=str)
def test_ref_agrees_with_groups_written_out(case):
    args = make(case)
    with poisoned():
        torch.testing.assert_close(short_attention_ref(**args), eager(**args))


@pytest.mark.parametrize("case", [SMALL, PACKED], ids=IDS)
def test_gradient_of_ref(case):
    args = make(case._replace(heads=1, head=2, batch=1, length=3))
    qkv = args.pop("qkv").detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: short_attention_ref(x, **args), qkv)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [5, 49])
def test_packed_equals_fixed(length, impl, device):
    skip_unless(impl, device)
    args = make(Case(3, length, 2, 16), device)
    bounds = torch.arange(0, 4 * length, length, dtype=torch.int32, device=device)
    packed = {"qkv": args["qkv"].detach().flatten(0, 1).requires_grad_(), "cu_seqlens": bounds, "max_seqlen": length}
    (want, want_grad), (got, got_grad) = (_run(a, impl) for a in (args, args | packed))
    torch.testing.assert_close(got.view_as(want), want)
    torch.testing.assert_close(got_grad.view_as(want_grad), want_grad)


@pytest.mark.parametrize("impl", FUSED)
def test_bound_changes_nothing(impl, device):
    skip_unless(impl, device)
    results = [
        _run(make(PACKED._replace(bound=bound), device) | {"qkv": _fixed_qkv(device)}, impl) for bound in (9, 90, None)
    ]
    for got, grad in results[1:]:
        torch.testing.assert_close(got, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


def _fixed_qkv(device: str) -> Tensor:
    return torch.randn(15, 96, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [Case(2, 50, 2, 24), PACKED], ids=IDS)
def test_probabilities_add_up_to_one(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with torch.no_grad():
        args["qkv"].unflatten(-1, (3, -1))[..., 2, :] = 1.0
        out = short_attention(**args, impl=impl)
    rows = out.shape[0] - case.behind if case.lengths else out.shape[0]
    torch.testing.assert_close(out[:rows], torch.ones_like(out[:rows]))
    assert not out[rows:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_permuting_groups_or_tokens_permutes_the_result(impl, device):
    skip_unless(impl, device)
    args = make(Case(3, 17, 2, 16), device)
    groups, tokens = torch.tensor([2, 0, 1], device=device), torch.randperm(17).to(device)
    moved = args["qkv"].detach()[groups][:, tokens].requires_grad_()
    (want, want_grad), (got, got_grad) = (_run(a, impl, sum_of_squares) for a in (args, args | {"qkv": moved}))
    torch.testing.assert_close(got, want[groups][:, tokens])
    torch.testing.assert_close(got_grad, want_grad[groups][:, tokens])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=IDS)
def test_groups_do_not_see_each_other(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    spoilt = args["qkv"].detach().clone()
    spoilt[0 if not case.lengths else slice(3, 12)] = float("nan")
    clean = ~spoilt.isnan().all(-1)
    (want, want_grad), (got, got_grad) = (_run(a, impl) for a in (args, args | {"qkv": spoilt.requires_grad_()}))
    assert torch.equal(got[clean], want[clean])
    assert torch.equal(got_grad[clean], want_grad[clean])
    assert got[~clean].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_behind_the_last_group_count_for_nothing(impl, device):
    skip_unless(impl, device)
    args = make(PACKED, device)
    with torch.no_grad():
        args["qkv"][-2:] = float("nan")
    with poisoned():
        out, grad = _run(args, impl)
    assert not out[-2:].any()
    assert not grad[-2:].any()
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_kernel_marks_a_group_longer_than_promised(device):
    """Past the front, as on a GPU where nobody looks at the lengths: NaN, never a read outside or a wrong number."""
    skip_unless("triton", device)
    args = make(Case(0, 0, 1, 16, lengths=(3, 40, 5)), device)
    config = (args["qkv"].detach(), args["cu_seqlens"], 1, 16, 0.25, "triton")
    with poisoned():
        out = torch.ops.mimfast.short_attention_fwd(*config)
        grad = torch.ops.mimfast.short_attention_bwd(torch.ones_like(out), *config)
    for x in (out, grad):
        assert x[3:43].isnan().all()
        assert x[:3].isfinite().all()
        assert x[43:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_and_one_token(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    torch.testing.assert_close(short_attention(**args, scale=0.25, impl=impl), short_attention(**args, impl="ref"))
    uniform = short_attention(**args, scale=0.0, impl=impl)
    v = args["qkv"].unflatten(-1, (3, -1))[..., 2, :]
    torch.testing.assert_close(uniform, v.mean(1, keepdim=True).expand_as(uniform))
    one = make(Case(2, 1, 2, 16), device)
    torch.testing.assert_close(short_attention(**one, impl=impl), one["qkv"][..., -32:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 7, 96), (2, 0, 96), (0, 96)], ids=str)
def test_nothing_in_nothing_out(shape, impl, device):
    skip_unless(impl, device)
    qkv = torch.zeros(shape, device=device, requires_grad=True)
    bounds = torch.zeros(2, dtype=torch.int32, device=device) if len(shape) == 2 else None
    out = short_attention(qkv, 2, cu_seqlens=bounds, impl=impl)
    assert out.shape == (*shape[:-1], 32)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == shape


@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_two_runs_are_equal_bit_by_bit(impl, device):
    skip_unless(impl, device)
    args = make(Case(1, 65, 1, 96, "bf16" if impl == "cpu" else "fp16"), device)
    (out, grad), (again, grad_again) = (_run(args, impl) for _ in range(2))
    assert torch.equal(out, again)
    assert torch.equal(grad, grad_again)


@pytest.mark.parametrize("case", [Case(3, 197, 4, 32), Case(0, 0, 5, 64, lengths=(70, 0, 131, 1, 256))], ids=IDS)
def test_number_of_threads_changes_no_bit(case):
    skip_unless("cpu", "cpu")
    args, threads, results = make(case), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_run(args, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("bounds", [(3, 40, 5), (0, 48, 12), (-5, 30, 99)], ids=str)
def test_native_code_stays_inside_whatever_the_bounds(bounds):
    """Past the front, as in compiled code where nobody looks at the lengths."""
    skip_unless("cpu", "cpu")
    qkv, cu = torch.randn(48, 48), torch.tensor(bounds, dtype=torch.int32)
    config = (qkv, cu, 1, 16, 0.25, "cpu")
    with poisoned():
        out = torch.ops.mimfast.short_attention_fwd(*config)
        grad = torch.ops.mimfast.short_attention_bwd(torch.ones_like(out), *config)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
def test_gradient_of_any_layout(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    out = short_attention(**args, impl=impl)
    (want,) = torch.autograd.grad(short_attention(**args, impl="ref"), args["qkv"], torch.ones_like(out))
    for upstream in (torch.ones((), device=device).expand_as(out), torch.ones(2, 32, 7, device=device).mT):
        (got,) = torch.autograd.grad(out, args["qkv"], upstream, retain_graph=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=IDS)
def test_contract(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    config = (args["qkv"].detach(), args.get("cu_seqlens"), 2, 16, 0.25, impl)
    torch.library.opcheck(torch.ops.mimfast.short_attention_fwd, config)
    grad = torch.randn(*config[0].shape[:-1], 32, device=device)
    torch.library.opcheck(torch.ops.mimfast.short_attention_bwd, (grad, *config))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("case", [SMALL, PACKED._replace(bound=9)], ids=IDS)
def test_compiles_without_a_graph_break(case, impl, device):
    skip_unless(impl, device)
    torch.compiler.reset()  # each implementation is a compilation, and torch gives up after eight of one function
    args = make(case, device)
    rest = {k: v for k, v in args.items() if k != "qkv"}

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(qkv: Tensor) -> Tensor:
        return 0.5 * short_attention(qkv, **rest, impl=impl)

    qkv = args["qkv"]
    (got,) = torch.autograd.grad(step(qkv).square().sum(), qkv)
    want_of = 0.5 * short_attention(qkv, **rest, impl="ref")
    (want,) = torch.autograd.grad(want_of.square().sum(), qkv)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    with torch.autocast(device, torch.bfloat16):
        inside = short_attention(**args, impl=impl)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, short_attention(**args, impl=impl))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU")
@pytest.mark.parametrize("impl", FUSED)
def test_graph_replay_takes_new_lengths(impl, device):
    args = make(Case(0, 0, 2, 64, "bf16", lengths=(50, 30, 20), bound=64), device)
    other = torch.tensor([0, 10, 60, 90], dtype=torch.int32, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(args, impl)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = _run(args, impl)
    args["cu_seqlens"].copy_(other)
    graph.replay()
    want, want_grad = _run(args, impl)
    assert torch.equal(out, want)
    assert torch.equal(grad, want_grad)


def sum_of_squares(out: Tensor) -> Tensor:
    return out.square().sum()


def _run(args: dict, impl: str, loss=Tensor.sum) -> tuple[Tensor, Tensor]:
    out = short_attention(**args, impl=impl)
    (grad,) = torch.autograd.grad(loss(out), args["qkv"])
    return out.detach(), grad


def bounds(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


BAD = [
    ({"qkv": torch.zeros(2, 7, 97)}, r"heads has 2, expected a divisor of 97 / 3 because q, k and v are split"),
    ({"heads": 0}, r"heads has 0, expected a divisor of 96 / 3"),
    ({"qkv": torch.zeros(7, 96)}, r"qkv has shape \(7, 96\), expected \(any, any, any\) because it is \(groups, tok"),
    ({"qkv": torch.zeros(2, 7, 96, dtype=torch.int64)}, r"qkv has dtype int64, expected float32 or"),
    ({"max_seqlen": 7}, r"max_seqlen has 7, expected None because without cu_seqlens every group has 7 tokens"),
    (
        {"cu_seqlens": bounds(0, 7)},
        r"qkv has shape \(2, 7, 96\), expected \(any, any\) because .* goes with cu_seqlens",
    ),
    ({"impl": "cuda"}, r"impl has 'cuda', expected one of 'auto', 'triton', 'cpu', 'sdpa', 'ref' because"),
    (
        {"qkv": torch.zeros(2, 7, 96, dtype=torch.float64), "impl": "triton"},
        r"impl has 'triton', .* code for a tensor of float64",
    ),
    (
        {"qkv": torch.zeros(2, 7, 96, dtype=torch.float16), "impl": "cpu"},
        r"impl has 'cpu', .* code for a tensor of float16",
    ),
    ({"heads": 4, "impl": "triton"}, r"because the kernel takes 16 to 128 values per head, and 32 / 4 heads is 8"),
    (
        {"qkv": torch.zeros(1, 257, 96), "impl": "triton"},
        r"because the kernel keeps a group on chip, which suits up to 256 tokens, and qkv gives 257",
    ),
    (
        {"qkv": torch.zeros(1, 129, 240), "heads": 1, "impl": "triton"},
        r"because 129 tokens x 80 values pad to 32768, and float32 keys beyond 8192 do not fit",
    ),
]
BAD_PACKED = [
    ({"cu_seqlens": bounds(0, 7).long()}, r"cu_seqlens has dtype int64, expected int32 because"),
    ({"cu_seqlens": bounds(0, 7)[None]}, r"cu_seqlens has shape \(1, 2\), expected \(any\) because it is one list"),
    ({"cu_seqlens": bounds()}, r"cu_seqlens has length 0, expected length groups \+ 1 because"),
    ({"cu_seqlens": bounds(0, 7).to("meta")}, r"cu_seqlens has device meta, expected cpu because qkv is there"),
    ({"cu_seqlens": bounds(1, 7)}, r"cu_seqlens has ends 1 and 7, expected 0 and at most 15 because qkv has 15 rows"),
    ({"cu_seqlens": bounds(0, 16)}, r"cu_seqlens has ends 0 and 16, expected 0 and at most 15 because"),
    ({"cu_seqlens": bounds(0, 9, 7)}, r"cu_seqlens has a step of -2, expected steps of 0 or more because"),
    ({"max_seqlen": 8}, r"max_seqlen has 8, expected 9 or more because the longest group of cu_seqlens has 9 tokens"),
    ({"max_seqlen": 0}, r"max_seqlen has 0, expected 1 or more because"),
    (
        {"max_seqlen": 257, "impl": "triton"},
        r"because the kernel keeps a group on chip, which suits up to 256 tokens, and max_seqlen gives 257",
    ),
]


@pytest.mark.parametrize(
    ("case", "change", "message"), [(SMALL, *bad) for bad in BAD] + [(PACKED, *bad) for bad in BAD_PACKED]
)
def test_says_what_is_wrong(case, change, message):
    with pytest.raises(UserError, match="short_attention: .*" + message):
        short_attention(**make(case) | change)
