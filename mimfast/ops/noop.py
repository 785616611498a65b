"""Copy a tensor, y = x: the living template of an op. CONTRIBUTING.md walks through its files.   n elements"""

from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("cuda", "triton", "cpu", "ref")


def noop_ref(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def noop(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return a contiguous copy of `x`; the gradient passes through.

    Args:
        x: any shape and layout, float32.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        Tensor of the shape of `x`, contiguous.
    Raises:
        UserError: wrong dtype, or the chosen implementation cannot take this call.
    """
    check_dtype("noop", "x", x, (torch.float32,), "the template is compiled for one type only")
    chosen = resolve("noop", impl, IMPLS, partial(_why_not, x))
    return noop_ref(x) if chosen == "ref" else _Noop.apply(x, chosen)


def _why_not(x: Tensor, impl: str) -> str | None:
    return why_not_on(impl, x.device.type)


# contract: one schema, one fake, one autograd for every implementation. define + impl + register_fake under a thin
# autograd.Function: custom_op with register_autograd costs tens of microseconds per call, as much as a small kernel.
torch.library.define("mimfast::noop", "(Tensor x, str impl) -> Tensor")


@torch.library.impl("mimfast::noop", ("cpu", "cuda"))
def _run(x: Tensor, impl: str) -> Tensor:
    x = x.contiguous()
    if impl == "triton":
        from mimfast.kernels.noop import noop as launch

        return launch(x)
    y, core = torch.empty_like(x), _native.core()
    assert core is not None  # or `resolve` would have refused
    if impl == "cpu":
        core.noop_cpu(x.data_ptr(), y.data_ptr(), x.numel())
    else:
        with torch.cuda.device_of(x):
            core.noop_cuda(x.data_ptr(), y.data_ptr(), x.numel(), torch.cuda.current_stream().cuda_stream)
    return y


@torch.library.register_fake("mimfast::noop")
def _fake(x: Tensor, impl: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Noop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, impl: str) -> Tensor:
        return torch.ops.mimfast.noop(x, impl)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
