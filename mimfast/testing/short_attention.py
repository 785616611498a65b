"""Cases of short_attention, for its test and its benchmark, and the chain of torch calls it replaces.

B groups of N tokens or T packed ones, D width, h heads of d values
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    batch: int
    length: int
    heads: int
    head: int
    dtype: str = "fp32"
    # or "sliced" (rows of a larger tensor behind a class token), "offset" (storage not aligned), "strided" (last
    # dimension not dense), "expanded" (one group seen `batch` times)
    layout: str = "plain"
    lengths: tuple[int, ...] = ()  # of packed groups; batch and length are then unused
    behind: int = 0  # rows after the last group
    bound: int | None = None  # max_seqlen

    def __str__(self) -> str:
        size = "+".join(map(str, self.lengths)) if len(self.lengths) < 9 else f"{len(self.lengths)} groups"
        size = (size or f"{self.batch}x{self.length}") + (f"+{self.behind} behind" if self.behind else "")
        return f"{size}-{self.heads}x{self.head}-{self.dtype}-{self.layout}-{self.bound}"


# lengths on both sides of every tile, head dims with and without padding; then layouts; then ragged groups
CASES = [
    Case(2, 7, 2, 16), Case(1, 50, 1, 64), Case(2, 17, 3, 24, "fp16"), Case(1, 98, 1, 32), Case(3, 1, 2, 48),
    Case(2, 16, 2, 80, "fp16"), Case(1, 49, 2, 32), Case(1, 49, 2, 32, "fp16"), Case(1, 50, 1, 64, "fp16"),
    Case(1, 64, 1, 128), Case(1, 65, 1, 96, "fp16"), Case(1, 197, 1, 32, "fp16"), Case(1, 197, 1, 64, "fp16"),
    Case(1, 131, 1, 24), Case(1, 130, 1, 128, "fp16"), Case(1, 98, 1, 80, "fp16"), Case(1, 256, 1, 16, "fp16"),
    Case(2, 7, 2, 16, "bf16"),
]  # fmt: skip
CASES += [Case(2, 17, 2, 24, layout=layout) for layout in ("sliced", "offset", "strided", "expanded")]
CASES += [
    Case(0, 0, 2, 16, lengths=(3, 7, 0, 1, 16)), Case(0, 0, 2, 24, lengths=(0, 0, 5, 17, 0), bound=17),
    Case(0, 0, 1, 32, "fp16", lengths=(49, 64, 50), bound=100), Case(0, 0, 1, 64, "fp16", lengths=(131, 2), bound=256),
    Case(0, 0, 2, 16, lengths=(3, 9), behind=5), Case(0, 0, 2, 16, lengths=(7, 7), layout="sliced"),
    Case(0, 0, 2, 16, lengths=(0, 0)), Case(0, 0, 2, 16, lengths=(0,), behind=2),
]  # fmt: skip
# MAE ViT-B encoder and decoder, Swin's windows at 224 px, two resolutions at 75 % packed in one batch
RAGGED = (50,) * 96 + (37,) * 64 + (65,) * 32
BENCH = [
    Case(256, 50, 12, 64, "bf16"), Case(256, 197, 16, 32, "bf16"), Case(2048, 49, 8, 32, "bf16"),
    Case(256, 197, 12, 64, "bf16"), Case(0, 0, 12, 64, "bf16", lengths=RAGGED, bound=65),
]  # fmt: skip


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of short_attention for one case: random, `qkv` requiring a gradient."""
    rows, width = sum(case.lengths) + case.behind, 3 * case.heads * case.head
    shape = (rows, width) if case.lengths else (case.batch, case.length, width)
    args = {"qkv": _qkv(shape, case, device).requires_grad_(), "heads": case.heads}
    if case.lengths:
        ends = torch.tensor((0, *case.lengths)).cumsum(0)
        args |= {"cu_seqlens": ends.to(device, torch.int32), "max_seqlen": case.bound}
    return args


def _qkv(shape: tuple[int, ...], case: Case, device: str) -> Tensor:
    *images, rows, width = shape
    if case.layout == "strided":
        x = torch.randn(*images, width, rows).mT
    elif case.layout == "sliced":
        x = torch.randn(*images, 1 + rows, width + 5)[..., 1:, 2:-3]
    elif case.layout == "offset":
        x = torch.randn(1 + int(torch.Size(shape).numel()))[1:].view(shape)
    elif case.layout == "expanded":
        x = torch.randn(1, rows, width).expand(shape)
    else:
        x = torch.randn(shape)
    if case.layout in ("plain", "strided"):
        return x.to(device, DTYPES[case.dtype])
    return x.to(device)  # float32, and the strides as they are


def eager(qkv: Tensor, heads: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:  # noqa: ARG001
    """What a model without fused attention writes, in the dtype of qkv: scores and probabilities are stored."""
    if cu_seqlens is not None:  # one group at a time; rows behind the last stay 0
        bounds = cu_seqlens.tolist()
        parts = [eager(qkv[None, i:j], heads)[0] for i, j in pairwise(bounds)]
        behind = qkv[bounds[-1] :, : qkv.shape[-1] // 3] * 0
        return torch.cat([*parts, behind])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
