"""Speed of window_attention against timm's window attention: from the qkv projection's output to proj's input.

`python bench/ops/bench_window_attention.py [--json FILE] [--rounds N]`. On a GPU: bf16, Swin-B; on a CPU: fp32, Swin-T
at batch 8, stages 1 to 3, and windows of 12.

"timm" is timm's WindowAttention as it runs by default, "timm fused" the same with its experimental switch for torch's
fused attention. Both get what surrounds it in timm's block: roll, padding, partition, reverse, crop and roll back of C
channels, forward and backward, but none of the work of the projections, whose place is taken by a function that hands
over q, k and v already in window order (and leaves their gradient in it). "compiled" is torch.compile of the whole
chain from q, k and v in image order, so that the compiler may join the partition with the copies it makes anyway.

Estimates for an H200 at 4.3 TB/s, bytes that cannot be avoided (forward 4u, backward 7u, u = B * H * W * C * 2):

    case                          forward MB, us     backward MB, us   fwd + bwd us
    Swin-B stage 1, batch 128      411     95.6       719     167        263
    Swin-B stage 2                 206     47.8       360      83.6      131
    Swin-B stage 3                 103     23.9       180      41.8       66
    Swin-B 384 px, window 12       302     70.2       528     123        193

Goals: CPU, forward and backward, 2 times "timm" at stage 1 and 1.5 times at stages 2 and 3; GPU, forward 3 times and
backward 2.5 times "timm fused".
"""

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from mimfast.ops._choice import why_not_on
from mimfast.ops.window_attention import IMPLS, window_attention, window_attention_ref
from mimfast.testing.bench import Args, Bench, Fn, main
from mimfast.testing.window_attention import BENCH, Case, eager, make

CPU_CASES = [
    Case(8, 56, 56, 3, 32, 7, 3), Case(8, 28, 28, 6, 32, 7, 3), Case(8, 14, 14, 12, 32, 7, 3),
    Case(8, 14, 14, 12, 32, 7), Case(2, 48, 48, 4, 32, 12, 6),
]  # fmt: skip
CASES = BENCH if torch.cuda.is_available() else CPU_CASES


class Enter(torch.autograd.Function):
    """The norm's output: some C channels, free of charge, whose gradient ends here."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        B, H, W, E = qkv.shape
        return qkv.detach().view(-1)[: B * H * W * E // 3].view(B, H, W, E // 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class Project(torch.autograd.Function):
    """q, k and v in window order, free of charge: `ready`, or when that is None by the copy that they stand for."""

    @staticmethod
    def forward(ctx: Any, x_windows: Tensor, qkv: Tensor, ready: Tensor | None, cut: Fn, back: Fn) -> Tensor:
        ctx.shape, ctx.ready, ctx.back = qkv.shape, ready is not None, back
        ctx.grad_x = _zeros(tuple(x_windows.shape), x_windows.dtype, x_windows.device)
        return cut(qkv) if ready is None else ready.view_as(ready)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grad_x, grad.view(ctx.shape) if ctx.ready else ctx.back(grad), None, None, None


@cache
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


class Timm:
    """timm's block around timm's attention. The first call of a case, which is judged, copies; raced ones do not."""

    def __init__(self, fused: bool) -> None:
        self.fused, self.shape, self.calls = fused, (), 0

    def __call__(self, qkv: Tensor, table: Tensor, window: int, shift: int, heads: int, pad: str | None) -> Tensor:
        _, H, W, E = qkv.shape
        if self.shape != (qkv.shape, shift):
            self.shape, self.calls = (qkv.shape, shift), 0
            self.block = SwinTransformerBlock(E // 3, (H, W), heads, window_size=window, shift_size=shift)
            self.block.to(qkv.device, qkv.dtype)
            self.attn = self.block.attn
            self.attn.fused_attn, self.attn.qkv, self.attn.proj = self.fused, nn.Identity(), nn.Identity()
            self.ready = self.cut(qkv.detach(), window, shift)
        del self.attn.relative_position_bias_table
        self.attn.relative_position_bias_table = table
        self.calls += 1
        cut, back = partial(self.cut, window=window, shift=shift), partial(self.back, window=window, size=(H, W, shift))
        windows = Project.apply(cut(Enter.apply(qkv)), qkv, None if self.calls <= 1 else self.ready, cut, back)
        return back(self.attn(windows, mask=self.block.attn_mask))

    def cut(self, x: Tensor, window: int, shift: int) -> Tensor:
        H, W = x.shape[1:3]
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        x = nn.functional.pad(x, (0, 0, 0, -W % window, 0, -H % window))
        return window_partition(x, (window, window)).view(-1, window * window, x.shape[-1])

    def back(self, windows: Tensor, window: int, size: tuple[int, int, int]) -> Tensor:
        H, W, shift = size
        whole = -(-H // window) * window, -(-W // window) * window
        x = window_reverse(windows.view(-1, window, window, windows.shape[-1]), (window, window), *whole)
        x = x[:, :H, :W].contiguous()
        return x.roll((shift, shift), (1, 2)) if shift else x


def contestants(device: str) -> dict[str, Fn]:
    peers = {"timm": Timm(False), "timm fused": Timm(True), "compiled": torch.compile(eager, dynamic=False)}
    return peers | {i: partial(window_attention, impl=i) for i in IMPLS if why_not_on(i, device) is None}


def bytes_moved(args: Args, with_gradient: bool) -> int:
    qkv = args["qkv"]
    return qkv.numel() // 3 * qkv.element_size() * (11 if with_gradient else 4)


def plain(qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What tolerance is measured by: our reference, or in half types the chain of torch calls in that type."""
    return (window_attention_ref if qkv.element_size() > 2 else eager)(qkv, *args, **kwargs)


if __name__ == "__main__":
    sys.exit(main(Bench("window_attention", CASES, make, plain, contestants, bytes_moved, yardstick="timm")))
