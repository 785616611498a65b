"""Cases of window_attention_v2: those of window_attention, with a logit scale for each head."""

from typing import Any

import torch
from torch import Tensor

from mimfast.testing import window_attention as plain
from mimfast.testing.window_attention import Case as Case

CASES = [case for case in plain.CASES if case.layout in ("plain", "strided")]
BIG = plain.BIG
BENCH = [
    Case(128, 64, 64, 4, 32, 8, 4, "bf16"), Case(128, 32, 32, 8, 32, 8, 4, "bf16"),
    Case(32, 48, 48, 8, 32, 12, 6, "bf16"), Case(128, 16, 16, 16, 32, 16, 0, "bf16"),
]  # fmt: skip


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of window_attention_v2 for one case: factors of the scores from 2 to 20, about 10 at the start."""
    scale = torch.linspace(0.7, 3.0, case.heads) if case.heads > 1 else torch.tensor([2.3])
    return plain.make(case, device) | {"logit_scale": scale.view(-1, 1, 1).to(device).requires_grad_()}


def eager(logit_scale: Tensor, **kwargs: Any) -> Tensor:
    """What a model without a fused kernel does."""
    return plain.eager(**kwargs, logit_scale=logit_scale)
