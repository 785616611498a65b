"""The template test of an op: parity and gradient, the contract, compile, messages, properties."""

from functools import partial

import pytest
import torch

from mimfast._check import UserError
from mimfast.ops.noop import IMPLS, noop, noop_ref
from mimfast.testing import assert_close_to_ref, emulated, poisoned, skip_unless
from mimfast.testing.noop import CASES, make

KERNELS = [impl for impl in IMPLS if impl != "ref"]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    with poisoned():
        assert_close_to_ref(partial(noop, impl=impl), noop_ref, args)
    out = noop(args["x"], impl=impl)
    assert torch.equal(out, args["x"])
    assert out.is_contiguous()


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("n", [1, 255, 257, 70001])
def test_cuda_source_run_on_the_cpu(n):
    x, y = torch.randn(n), torch.full((n + 1,), float("nan"))
    emulated.core().noop_cuda(x.data_ptr(), y.data_ptr(), n, 0)
    assert torch.equal(y[:n], x)
    assert y[n].isnan()


@pytest.mark.parametrize("impl", KERNELS)
def test_contract(impl, device):
    skip_unless(impl, device)
    torch.library.opcheck(torch.ops.mimfast.noop, (torch.randn(3, 5, device=device), impl))


@pytest.mark.parametrize("impl", ["auto", *KERNELS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    x = torch.randn(4, 6, device=device, requires_grad=True)
    out = torch.compile(partial(noop, impl=impl), backend="aot_eager", fullgraph=True)(x.t())
    out.sum().backward()
    assert torch.equal(out, x.t())
    assert torch.equal(x.grad, torch.ones_like(x))


def test_gradient_of_ref():
    assert torch.autograd.gradcheck(noop_ref, torch.randn(3, dtype=torch.float64, requires_grad=True))


def test_says_what_is_wrong_with_the_dtype():
    with pytest.raises(UserError, match=r"noop: x has dtype float16, expected float32 because .* one type"):
        noop(torch.zeros(2, dtype=torch.float16))
