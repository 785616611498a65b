"""Speed of short_attention against every SDPA backend, each with the views and copies that a packed projection needs.

`python bench/ops/bench_short_attention.py [--json FILE] [--rounds N]`. On a GPU: bf16, the shapes below; on a CPU: the
same groups in fp32 and small batches, for the ratios only. Peers read [q | k | v] by a permute and merge heads at the
end, as model code does; "compiled" is torch.compile of the same call on the backend torch chooses, "indexed" takes q, k
and v by index instead of unbind, as much published code does (its backward fills zeros and adds).

Estimates for an H200 at 4.3 TB/s, bytes that cannot be avoided (forward 4u, backward 7u, u = tokens * D * 2):

    case                            forward MB, us     backward MB, us   fwd + bwd us
    256 x  50, 12 heads of 64        78.6    18.3       137.6    32.0      50
    256 x 197, 16 heads of 32       206.6    48.0       361.5    84.1     132
    2048 x 49,  8 heads of 32       205.5    47.8       359.7    83.6     131
    256 x 197, 12 heads of 64       309.9    72.1       542.2   126.1     198
    ragged 37..65, 12 heads of 64    56.8    13.2        99.4    23.1      36

Goal at N = 50: 1.3 times the best backend, 60 % of the floor. Padding to powers of two makes 1.64 times the scores at
N = 50 and 1.69 times at 197, where matrix products then take about as long as memory.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimfast.ops._choice import why_not_on
from mimfast.ops.short_attention import IMPLS, short_attention, short_attention_ref
from mimfast.testing.bench import Args, Bench, Fn, main
from mimfast.testing.short_attention import BENCH, Case, eager, make

CPU_CASES = [
    Case(8, 50, 12, 64), Case(8, 197, 16, 32), Case(64, 49, 8, 32),
    Case(0, 0, 12, 64, lengths=(50, 37, 65) * 4, bound=65),
]  # fmt: skip
CASES = BENCH if torch.cuda.is_available() else CPU_CASES
BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def fixed(qkv: Tensor, heads: int, backend: SDPBackend | None = None, indexed: bool = False) -> Tensor:
    qkv = qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (qkv[0], qkv[1], qkv[2]) if indexed else qkv.unbind(0)
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(*out.shape[:1], out.shape[2], -1)


def varlen(qkv: Tensor, heads: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's packed attention as its page shows it."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen).flatten(1)


def padded(qkv: Tensor, heads: int, cu_seqlens: Tensor, max_seqlen: int, backend: SDPBackend | None = None) -> Tensor:
    """Groups padded to the longest, keys masked, the padding dropped again."""
    slot = torch.arange(max_seqlen, device=qkv.device)
    inside = slot < cu_seqlens.diff()[:, None]
    row = (cu_seqlens[:-1, None] + slot).clamp(max=len(qkv) - 1)
    q, k, v = qkv[row].view(*row.shape, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(list(BACKENDS.values()) if backend is None else backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None])
    return out.transpose(1, 2).reshape(*row.shape, -1)[inside]


def either(of_fixed: Fn, of_packed: Fn) -> Fn:
    """One contestant for both kinds of case."""

    def run(qkv: Tensor, heads: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        return of_fixed(qkv, heads) if cu_seqlens is None else of_packed(qkv, heads, cu_seqlens, max_seqlen)

    return run


def contestants(device: str) -> dict[str, Fn]:
    packed = varlen if device == "cuda" else padded
    compiled = torch.compile(fixed, dynamic=False)
    peers = {
        "torch": either(fixed, packed),
        "indexed": either(partial(fixed, indexed=True), padded),
        "compiled": either(compiled, torch.compile(packed, dynamic=False) if device == "cuda" else packed),
        "eager": eager,
    }
    if device == "cuda":
        backends = {n: either(partial(fixed, backend=b), partial(padded, backend=b)) for n, b in BACKENDS.items()}
        peers |= {name: fn for name, fn in backends.items() if _runs(fn, device)}
    return peers | {i: partial(short_attention, impl=i) for i in IMPLS if why_not_on(i, device) is None}


def _runs(fn: Fn, device: str) -> bool:
    try:
        for case in CASES:
            args = make(case, device)
            fn(**args).sum().backward()
    except RuntimeError:  # a backend that this card or this shape does not have
        return False
    return True


def bytes_moved(args: Args, with_gradient: bool) -> int:
    qkv = args["qkv"]
    return qkv.numel() // 3 * qkv.element_size() * (11 if with_gradient else 4)


def plain(qkv: Tensor, heads: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
    """What tolerance is measured by: our reference, or in half types the chain of torch calls in that type."""
    if qkv.element_size() > 2:
        return short_attention_ref(qkv, heads, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return eager(qkv, heads, cu_seqlens, max_seqlen)


if __name__ == "__main__":
    sys.exit(main(Bench("short_attention", CASES, make, plain, contestants, bytes_moved, yardstick="torch")))
