"""Speed of window_attention_v2 against timm's Swin V2 attention: from the qkv projection's output to proj's input.

`python bench/ops/bench_window_attention_v2.py [--json FILE] [--rounds N]`. On a GPU: bf16, Swin V2-B at 256 px; on a
CPU: fp32, Swin V2-T at batch 4. Peers as in bench_window_attention.py: "timm" has its roll, partition and reverse but
none of the work of the projections and of the MLP that makes the table; "compiled" is torch.compile of the whole chain.
Nobody is asked for the gradient of the logit scale (ours makes it anyway): it is one number for a head, whose error is
too much a matter of luck to admit contestants by it. The tests judge it.

Estimates for an H200 at 4.3 TB/s, bytes that cannot be avoided (forward 4u, backward 7u, u = B * H * W * C * 2):

    case                           forward MB, us     backward MB, us   fwd + bwd us
    stage 1, window 8, batch 128    537    125         940     219        344
    stage 2, window 8               268     62.4       470     109        172
    stage 2, window 12, batch 32    151     35.1       264      61.4       96.5
    stage 3, window 16, batch 128   134     31.2       235      54.6       85.8
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from bench_window_attention import Timm, bytes_moved
from torch import Tensor

from mimfast.ops._choice import why_not_on
from mimfast.ops.window_attention_v2 import IMPLS, window_attention_v2, window_attention_v2_ref
from mimfast.testing.bench import Bench, Fn, main
from mimfast.testing.window_attention import _offsets
from mimfast.testing.window_attention_v2 import BENCH, Case, eager, make

CPU_CASES = [Case(4, 64, 64, 3, 32, 8, 4), Case(4, 32, 32, 6, 32, 8, 4), Case(4, 16, 16, 12, 32, 16)]
CASES = BENCH if torch.cuda.is_available() else CPU_CASES


class TimmV2(Timm):
    """The arithmetic of timm's WindowAttention of Swin V2, on what its projections would have made."""

    def __call__(self, logit_scale: Tensor, **kwargs: Any) -> Tensor:
        self.logit_scale = logit_scale
        return super().__call__(**kwargs)

    def attend(self, windows: Tensor, table: Tensor, heads: int) -> Tensor:
        q, k, v = windows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attn = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
        attn = attn * self.logit_scale.clamp(max=math.log(100.0)).exp()
        window = self.block.window_size
        attn = attn + table[_offsets(*window).to(table.device)].permute(2, 0, 1).contiguous()
        if (mask := self.block.attn_mask) is not None:
            attn = attn.unflatten(0, (-1, len(mask))) + mask[:, None]
            attn = attn.flatten(0, 1)
        return (attn.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def contestants(device: str) -> dict[str, Fn]:
    peers = {"timm": TimmV2(False), "compiled": torch.compile(eager, dynamic=False)}
    return peers | {i: partial(window_attention_v2, impl=i) for i in IMPLS if why_not_on(i, device) is None}


def make_still(case: Case, device: str) -> dict[str, Any]:
    args = make(case, device)
    return args | {"logit_scale": args["logit_scale"].detach()}


def plain(**kwargs: Any) -> Tensor:
    """What tolerance is measured by: our reference, or in half types the chain of torch calls in that type."""
    return (window_attention_v2_ref if kwargs["qkv"].element_size() > 2 else eager)(**kwargs)


if __name__ == "__main__":
    sys.exit(main(Bench("window_attention_v2", CASES, make_still, plain, contestants, bytes_moved, yardstick="timm")))
