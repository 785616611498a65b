"""Cases of noop, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    shape: tuple[int, ...]
    transposed: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ("-transposed" if self.transposed else "")


# one element, one block, one more than a block, several dimensions, no element at all, another layout
CASES = [Case((1,)), Case((1024,)), Case((1025,)), Case((3, 5, 7)), Case((0,)), Case((33, 65), transposed=True)]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of noop for one case, random, requiring a gradient."""
    x = torch.randn(case.shape, device=device)
    return {"x": (x.t() if case.transposed else x).requires_grad_()}
