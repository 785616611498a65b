"""x W^T + b, and on a CPU in float32 through oneDNN, whose products are faster than the BLAS that torch calls there.

Measured on the products of MAE ViT-B at batch 8 (bench/step/bench_mae_step.py shows the step). AMD EPYC (Zen 4), one
core: forward 15 %, gradient of x 8 % less time, gradient of W the same. AMD EPYC (Zen 5), two cores: 470, 440 and 410
GFLOP/s where the BLAS stays at 217, the rate of vectors half as wide as that processor's.
n rows, E values in, D values out
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x W^T + b (+ add), as `torch.nn.functional.linear`.

    Args:
        x: (..., E).
        weight: (D, E).
        bias: (D,) or None.
        add: (..., D) or None, added to the product: a residual.
    """
    tensors = [t for t in (x, weight, bias, add) if t is not None]
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and _onednn():
        return _Linear.apply(x, weight, bias, add)
    y = F.linear(x, weight, bias)
    return y if add is None else add + y


def _onednn() -> bool:
    return _HAS_ONEDNN and not torch.is_autocast_enabled("cpu")


def _has_onednn() -> bool:
    """Measured on x86 only; the operators are torch's own for its compiler and have no public name."""
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise",))


_HAS_ONEDNN = _has_onednn()

torch.library.define("mimfast::linear_cpu", "(Tensor x, Tensor weight, Tensor? bias, Tensor? add) -> Tensor")


@torch.library.impl("mimfast::linear_cpu", "cpu")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    if x.numel() == 0:
        y = F.linear(x, weight, bias)
        return y if add is None else y + add
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("mimfast::linear_cpu")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add):
        ctx.save_for_backward(x, weight)
        return torch.ops.mimfast.linear_cpu(x, weight, bias, add)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, need_add = ctx.needs_input_grad
        grad_nD, x_nE = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        d_x = torch.ops.mimfast.linear_cpu(grad_nD, weight.t(), None, None).view(x.shape) if need_x else None
        d_weight = torch.ops.mimfast.linear_cpu(grad_nD.t(), x_nE.t(), None, None) if need_weight else None
        d_bias = grad_nD.sum(0) if need_bias else None
        return d_x, d_weight, d_bias, grad if need_add else None
