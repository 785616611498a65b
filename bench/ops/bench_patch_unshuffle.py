"""Speed of patch_unshuffle against the eager chain of the official MAE (repeat, cat, gather, cat, add), and compiled.

`python bench/ops/bench_patch_unshuffle.py [--json FILE]`. On a GPU: MAE's decoder, 224 px, patch 16, 75 % hidden, width
512, visible tokens in bf16. On a CPU: small batches in fp32.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast.ops._choice import why_not_on
from mimfast.ops.patch_unshuffle import IMPLS, patch_unshuffle, patch_unshuffle_ref
from mimfast.testing.bench import Args, Bench, Fn, main
from mimfast.testing.patch_unshuffle import BENCH, Case, make

CASES = BENCH if torch.cuda.is_available() else [Case(b, 196, 49, 512) for b in (2, 8)]


def eager(visible: Tensor, mask_token: Tensor, inverse: Tensor, pos: Tensor, prefix: int) -> Tensor:
    """The usual chain; `prefix` is one class token."""
    hidden = mask_token.repeat(visible.shape[0], inverse.shape[1] + prefix - visible.shape[1], 1)
    pool = torch.cat([visible[:, prefix:], hidden], dim=1)
    pool = torch.gather(pool, 1, inverse.unsqueeze(-1).repeat(1, 1, visible.shape[2]))
    return torch.cat([visible[:, :prefix], pool], dim=1) + pos


def contestants(device: str) -> dict[str, Fn]:
    ours = {impl: partial(patch_unshuffle, impl=impl) for impl in IMPLS if why_not_on(impl, device) is None}
    return {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "ref compiled": torch.compile(patch_unshuffle_ref, dynamic=False),
    } | ours


def bytes_moved(args: Args, with_gradient: bool) -> int:
    visible, (B, L) = args["visible"], args["inverse"].shape
    D, size = visible.shape[2], visible.element_size()
    out = torch.promote_types(visible.dtype, args["pos"].dtype).itemsize * B * (args["prefix"] + L) * D
    forward = visible.numel() * size + out + args["inverse"].numel() * 8
    return forward + (out + visible.numel() * size if with_gradient else 0)


if __name__ == "__main__":
    sys.exit(main(Bench("patch_unshuffle", CASES, make, patch_unshuffle_ref, contestants, bytes_moved)))
