"""Cases of patch_unshuffle, for its test and its benchmark.   B batch, S prefix, L tokens, K visible ones, D width"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    batch: int
    tokens: int
    kept: int
    dim: int
    visible: str = "fp32"
    table: str = "fp32"  # type of mask_token and pos
    prefix: int = 1
    pos: str = "fixed"  # or "learned", "none"
    layout: str = "plain"  # or "sliced" (every other column of a wider, later-starting tensor), "expanded" (one image)

    def __str__(self) -> str:
        size = f"{self.batch}x{self.tokens}/{self.kept}x{self.dim}+{self.prefix}"
        return f"{size}-{self.visible}-{self.table}-{self.pos}-{self.layout}"


# types x positions on one tiny shape, then layouts and prefixes, then odd sizes
CASES = [
    Case(2, 6, 2, 12, visible, table, pos=pos)
    for visible, table in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))
    for pos in ("learned", "fixed", "none")
]
CASES += [Case(3, 9, 4, 8, pos="learned", layout=layout) for layout in ("sliced", "expanded")]
CASES += [Case(2, 6, 2, 12, prefix=prefix, pos="learned") for prefix in (0, 2)]
CASES += [
    Case(1, 1, 1, 1), Case(17, 5, 1, 3, pos="learned"), Case(2, 16, 15, 130), Case(1, 4, 4, 7),
    Case(2, 9, 3, 515, pos="learned"),
]  # fmt: skip
BENCH = [Case(b, 196, 49, 512, "bf16", table) for b in (64, 256) for table in ("bf16", "fp32")]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of patch_unshuffle for one case: random, tokens requiring gradients, positions if "learned"."""
    table, B, L = DTYPES[case.table], case.batch, case.tokens
    pos = torch.randn(case.prefix + L, case.dim).to(device, table) if case.pos != "none" else None
    inverse_BL = torch.rand(B, L).argsort(-1)
    if case.layout == "sliced":
        inverse_BL = torch.stack([inverse_BL, inverse_BL], dim=-1)[..., 1]
    return {
        "visible": _visible(case).to(device).requires_grad_(),
        "mask_token": torch.randn(1, 1, case.dim).to(device, table).requires_grad_(),
        "inverse": inverse_BL.to(device),
        "pos": pos.requires_grad_() if pos is not None and case.pos == "learned" else pos,
        "prefix": case.prefix,
    }


def _visible(case: Case) -> Tensor:
    rows, dtype = case.prefix + case.kept, DTYPES[case.visible]
    if case.layout == "sliced":
        return torch.randn(case.batch, 3 + rows, 2 * case.dim).to(dtype)[:, 3:, 1::2]
    if case.layout == "expanded":
        return torch.randn(1, rows, case.dim).to(dtype).expand(case.batch, -1, -1)
    return torch.randn(case.batch, rows, case.dim).to(dtype)
