"""window_attention_v2 by its CUDA kernel, on a GPU and emulated: what differs from test_window_attention_cuda.py."""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops import _windows
from mimfast.ops.window_attention_v2 import window_attention_v2
from mimfast.testing import assert_close_to_ref, compare, emulated, poisoned, skip_unless
from mimfast.testing.window_attention import HALF
from mimfast.testing.window_attention_v2 import Case, eager, make

FRONT = import_module("mimfast.ops.window_attention_v2")
cuda = partial(window_attention_v2, impl="cuda")
SMALL = Case(2, 16, 8, 3, 32, 8, 4, "bf16")
PADDED = Case(2, 5, 6, 1, 64, 4, 2, "fp16", "pad_then_roll", bias=True)
GROUPED = Case(1, 8, 16, 2, 24, 8, 4, "bf16", groups=2)
THREE, IDS = [SMALL, PADDED, GROUPED], ["whole", "padded", "grouped"]


@pytest.fixture(params=["emulated", "cuda"])
def where(request, monkeypatch) -> str:
    """The device of the tensors of window_attention_v2(impl="cuda"), the CPU where the kernel is emulated."""
    if request.param == "cuda":
        skip_unless("cuda", "cuda" if torch.cuda.is_available() else "cpu")
        return "cuda"
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    monkeypatch.setattr(_windows, "why_not_on", lambda *_: None)
    monkeypatch.setattr(FRONT, "_native", SimpleNamespace(core=emulated.core))
    return "cpu"


# torch's own chain in float16 divides the zero key of padding by its norm of 0
@pytest.mark.parametrize("case", [c for c in HALF if c.bias or not c.pad], ids=str)
def test_value_and_gradient(case, where):
    args = make(case, where)
    args["logit_scale"].requires_grad_(False)  # one number for a head, and its error is luck: judged below
    with poisoned():
        assert_close_to_ref(cuda, eager, args)


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_gradient_of_logit_scale(case, where):
    """The tolerance rule for the root mean square over several upstream gradients."""
    args, errors = make(case, where), []
    for seed in range(8):
        found = compare(cuda, eager, args, seed)
        errors += [(e.kernel, e.torch, e.allowed - 2 * e.torch) for e in found if "logit_scale" in e.name]
    kernel, torchs, noise = torch.tensor(errors).square().mean(0).sqrt().tolist()
    print(f"kernel {kernel:.3e}, torch {torchs:.3e}, noise {noise:.3e}")
    assert len(errors) == 8
    assert kernel <= 2 * torchs + noise


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_two_runs_are_equal_to_the_bit(case, where):
    args = make(case._replace(batch=3), where)
    (out, grads), (again, grads_again) = _run(args), _run(args)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_without_a_norm_have_no_gradient(dtype, where):
    """The key of padding is 0 in Swin V2; and so may be those of tokens."""
    args = make(Case(1, 5, 6, 2, 32, 4, 2, dtype, "roll_then_pad", bias=True), where)
    with torch.no_grad():
        args["qkv_bias"].view(3, -1)[1] = 0.0
        args["qkv"][0, 2, 3] = 0.0
    out, (d_qkv, _, d_bias, d_scale) = _run(args)
    assert all(torch.isfinite(x).all() for x in (out, d_qkv, d_bias, d_scale))
    assert not d_qkv[0, 2, 3, :128].any()
    assert not d_bias.view(3, -1)[:2].any()


def test_size_of_rows_does_not_matter(where):
    args = make(SMALL, where)
    larger = args["qkv"].detach().clone()
    larger[..., :192] *= 64.0  # a power of 2: nothing is rounded
    want, got = cuda(**args), cuda(**args | {"qkv": larger})
    assert torch.equal(want, got)


@pytest.mark.parametrize("case", THREE, ids=IDS)
def test_contract(case, where):
    args = make(case, where)
    group = args["group"].int() if case.groups else None
    tensors = [None if x is None else x.detach() for x in (args["qkv"], args["table"], args.get("qkv_bias"))]
    tensors += [args["logit_scale"].detach().flatten().exp(), group]
    config = (*tensors, [case.window] * 2, [case.shift] * 2, case.heads, case.pad or "pad_then_roll", -100.0, "cuda")
    torch.library.opcheck(torch.ops.mimfast.window_attention_v2_fwd, config)
    grad = torch.randn(*tensors[0].shape[:-1], case.heads * case.head, device=where).to(tensors[0].dtype)
    torch.library.opcheck(torch.ops.mimfast.window_attention_v2_bwd, (grad, *config))


def test_says_what_it_does_not_take():
    with pytest.raises(UserError, match=r"window_attention_v2: impl has 'cuda', .* up to 64 tokens, and this window"):
        cuda(**make(Case(1, 16, 16, 1, 32, 16, 0, "bf16")))


def _run(args: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = cuda(**args)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)
