"""window_attention by its CUDA kernel, on a GPU and emulated: half types only, so that its tests are apart."""

import math
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops import _windows
from mimfast.ops._windows_native import run_cuda
from mimfast.ops.window_attention import window_attention
from mimfast.testing import assert_close_to_ref, emulated, poisoned, skip_unless
from mimfast.testing.window_attention import CASES, HALF, Case, eager, make

FRONT = import_module("mimfast.ops.window_attention")
cuda = partial(window_attention, impl="cuda")
SMALL = Case(1, 14, 7, 3, 32, 7, 3, "bf16")
PADDED = Case(2, 5, 6, 2, 32, 4, 2, "fp16", "pad_then_roll", bias=True)
GROUPED = Case(1, 8, 16, 2, 24, 8, 4, "bf16", groups=2)
TAKEN = [c for c in CASES if c.dtype != "fp32" and math.prod(_windows.pair(c.window)) <= _windows.TOKENS_CUDA]
THREE, IDS = [SMALL, PADDED, GROUPED], ["whole", "padded", "grouped"]


@pytest.fixture(params=["emulated", "cuda"])
def where(request, monkeypatch) -> str:
    """The device of the tensors of window_attention(impl="cuda"), which is on the CPU where the kernel is emulated."""
    if request.param == "cuda":
        skip_unless("cuda", "cuda" if torch.cuda.is_available() else "cpu")
        return "cuda"
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    monkeypatch.setattr(_windows, "why_not_on", lambda *_: None)
    monkeypatch.setattr(FRONT, "_native", SimpleNamespace(core=emulated.core))
    return "cpu"


@pytest.mark.parametrize("case", TAKEN + HALF, ids=str)
def test_value_and_gradient(case, where):
    with poisoned():
        assert_close_to_ref(cuda, eager, make(case, where))


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_blocks_walk_through_windows(case, parts, where, monkeypatch):
    """Any number of blocks, more than windows too, gives the same; sums over windows but for rounding."""
    monkeypatch.setattr(FRONT, "run_cuda", partial(run_cuda, parts=parts))
    args = make(case._replace(batch=2), where)
    with poisoned():
        out, (d_qkv, *sums) = _run(args)
    monkeypatch.setattr(FRONT, "run_cuda", partial(run_cuda, parts=3))
    want, (d_want, *sums_want) = _run(args)
    assert torch.equal(out, want)
    assert torch.equal(d_qkv, d_want)
    for got, expected in zip(sums, sums_want):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_two_runs_are_equal_to_the_bit(case, where):
    args = make(case._replace(batch=3), where)
    (out, grads), (again, grads_again) = _run(args), _run(args)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))


def test_sums_over_windows_are_float32(where):
    """The bias gradient of many windows does not lose what half types would."""
    args = make(Case(40, 4, 4, 1, 16, 4, 0, "bf16"), where)
    wide = {k: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for k, v in args.items()}
    (got,), (want,) = (
        torch.autograd.grad(fn(**a), a["table"], torch.ones(40, 4, 4, 16, device=where).to(a["qkv"].dtype))
        for fn, a in ((cuda, args), (eager, wide))
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
    assert got.sum().abs() < 1e-5 * got.abs().sum()  # each row of probabilities keeps its sum


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_probabilities_add_up_to_one(case, where):
    args = make(case, where)
    with torch.no_grad():
        args["qkv"].unflatten(-1, (3, -1))[..., 2, :] = 1.0
        if case.bias:
            args["qkv_bias"].view(3, -1)[2] = 1.0
        out = cuda(**args)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=2.0**-7)


@pytest.mark.parametrize("mask_value", [0.0, -100.0, float("-inf")])
def test_mask_of_the_roll(mask_value, where):
    args = make(SMALL, where) | {"mask_value": mask_value}
    assert_close_to_ref(cuda, eager, args)
    (grad,) = torch.autograd.grad(cuda(**args)[:, :3].sum(), args["qkv"])
    assert not grad.isnan().any()
    assert grad[:, 11:].any() == (mask_value == 0.0)  # the first rows share windows with the last ones


def test_groups_do_not_see_each_other(where):
    args = make(GROUPED, where)
    second = args["group"] == 1
    other = args["qkv"].detach().clone()
    other[second] = torch.randn_like(other[second])
    (want, want_grads), (got, got_grads) = (_run(a) for a in (args, args | {"qkv": other.requires_grad_()}))
    assert torch.equal(got[~second], want[~second])
    assert torch.equal(got_grads[0][~second], want_grads[0][~second])
    assert not torch.equal(got[second], want[second])


def test_a_bad_window_spoils_no_other(where):
    """Blocks use their memory again for the next window: what is not a number stays where it was."""
    args = make(Case(9, 7, 7, 1, 24, 7, 0, "bf16", table="none"), where)
    (want, (want_grad,)) = _run(args)
    spoiled = args["qkv"].detach().clone()
    spoiled[2, 6, 6] = torch.nan
    got, (got_grad,) = _run(args | {"qkv": spoiled.requires_grad_()})
    rest = torch.arange(9, device=where) != 2
    assert torch.equal(got[rest], want[rest])
    assert torch.equal(got_grad[rest], want_grad[rest])
    assert got[2].isnan().all()


def test_gradient_of_any_layout(where):
    args = make(SMALL, where)
    out = cuda(**args)
    upstreams = [torch.ones((), device=where).bfloat16().expand_as(out)]
    upstreams += [torch.ones(1, 96, 14, 7, device=where).bfloat16().movedim(1, -1)]
    want, *got = (
        torch.autograd.grad(out, args["qkv"], u, retain_graph=True)[0] for u in (torch.ones_like(out), *upstreams)
    )
    assert all(torch.equal(want, g) for g in got)


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_contract(case, where):
    args = make(case, where)
    group = args["group"].int() if case.groups else None
    tensors = [None if x is None else x.detach() for x in (args["qkv"], args["table"], args.get("qkv_bias"), group)]
    side, shift = [case.window] * 2, [case.shift] * 2
    config = (*tensors, side, shift, case.heads, 0.25, case.pad or "pad_then_roll", -100.0, "cuda")
    torch.library.opcheck(torch.ops.mimfast.window_attention_fwd, config)
    grad = torch.randn(*tensors[0].shape[:-1], case.heads * case.head, device=where).to(tensors[0].dtype)
    torch.library.opcheck(torch.ops.mimfast.window_attention_bwd, (grad, *config))


def test_no_image_and_no_gradient_of_what_was_not_given(where):
    out, grads = _run(make(PADDED._replace(batch=0), where))
    assert out.shape == (0, 5, 6, 64)
    assert not any(g.any() for g in grads)
    args = make(PADDED._replace(table="none"), where)
    args["qkv_bias"].requires_grad_(False)
    assert len(_run(args)[1]) == 1


def test_side_stream_and_graph_replay(where):
    if where != "cuda":
        pytest.skip("streams are those of a GPU")
    args = {k: v.detach() if isinstance(v, Tensor) else v for k, v in make(SMALL, where).items()}
    want, stream, graph = cuda(**args), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = cuda(**args)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, want)
    with torch.cuda.graph(graph):
        out = cuda(**args)
    args["qkv"].mul_(-1.0)
    graph.replay()
    assert torch.equal(out, cuda(**args))


REFUSED = [
    (SMALL._replace(dtype="fp32"), r"multiplies bfloat16 and float16 on tensor cores and was given float32"),
    (Case(1, 12, 12, 1, 32, 12, 0, "bf16"), r"suits up to 64 tokens, and this window has 144"),
    (Case(1, 4, 4, 1, 8, 4, 0, "bf16"), r"takes 16 to 64 values per head, in whole chunks of 8, and 8 / 1 heads is 8"),
    (Case(1, 4, 4, 1, 20, 4, 0, "bf16"), r"16 to 64 values per head, in whole chunks of 8, and 20 / 1 heads is 20"),
    (Case(1, 4, 4, 1, 72, 4, 0, "fp16"), r"16 to 64 values per head, in whole chunks of 8, and 72 / 1 heads is 72"),
]


@pytest.mark.parametrize(("case", "message"), REFUSED)
def test_says_what_it_does_not_take(case, message):
    with pytest.raises(UserError, match=r"window_attention: impl has 'cuda', .* because the kernel .*" + message):
        cuda(**make(case))


def _run(args: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = cuda(**args)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)
