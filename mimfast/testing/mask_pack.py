"""Cases of mask_pack, for its test and its benchmark."""

from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    batch: int
    tokens: int
    visible: int | None = None  # None: ragged
    most_hidden: int | None = None  # of ragged rows

    def __str__(self) -> str:
        kind = f"visible{self.visible}" if self.visible is not None else f"ragged{self.most_hidden or ''}"
        return f"{self.batch}x{self.tokens}-{kind}"


CASES = [
    Case(5, 196, 49),
    Case(5, 196, None, 75),
    Case(4, 300),
    Case(1, 1, 1),
    Case(3, 7, 7),
    Case(3, 7, 0),
    Case(2, 1568, 160),
    Case(130, 33, None, 20),
    Case(3, 40, None, 0),
    Case(0, 196, 49),
    Case(0, 196),
]

BENCH = [Case(256, 196, 49), Case(256, 196, None, 75), Case(64, 1568, 160)]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of mask_pack for one case."""
    noise = torch.rand(case.batch, case.tokens)
    if case.visible is not None:
        hidden = noise.argsort(1).argsort(1) >= case.visible
    else:
        most = case.tokens if case.most_hidden is None else case.most_hidden
        hidden = noise.argsort(1).argsort(1) < torch.randint(0, most + 1, (case.batch, 1))
    return {"hidden": hidden.to(device), "visible": case.visible, "most_hidden": case.most_hidden}
