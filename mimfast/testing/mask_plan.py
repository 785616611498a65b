"""Cases of mask_plan, for its test and its benchmark, and what the tests of all mask ops share."""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast import _native
from mimfast.testing import emulated, skip_unless


class Case(NamedTuple):
    batch: int
    grid: tuple[int, int]
    ratio: float | tuple[float, ...]
    unit: int = 1
    rounding: str = "keep_floor"

    def __str__(self) -> str:
        rule = "" if self.rounding == "keep_floor" else f"-{self.rounding}"
        ratio = "mixed" if isinstance(self.ratio, tuple) else f"{self.ratio:g}"
        return f"{self.batch}x{self.grid[0]}x{self.grid[1]}-{ratio}-unit{self.unit}{rule}"


# MAE at 224 px; SimMIM's 32 px units on 4 px tokens of 192 px; one token; nothing hidden; all but one hidden; odd
# sizes; more than a warp's, a block's and the largest block's first chunk of units; VideoMAE's and MaskFeat's rounding;
# ratios per sample
CASES = [
    Case(5, (14, 14), 0.75),
    Case(3, (48, 48), 0.6, 8, "hide_ceil"),
    Case(2, (1, 1), 0.0),
    Case(3, (7, 5), 0.0),
    Case(3, (7, 5), 0.97),
    Case(4, (15, 9), 0.7, 3),
    Case(3, (14, 14), 0.65, 2, "hide_ceil"),
    Case(2, (16, 17), 0.5),
    Case(2, (33, 31), 0.9),
    Case(1, (64, 128), 0.75),
    Case(2, (14, 14), 0.9, 1, "hide_floor"),
    Case(2, (14, 14), 0.4, 1, "hide_round"),
    Case(4, (14, 14), (0.75, 0.5, 0.95, 0.0)),
    Case(3, (12, 18), (0.4, 0.6, 0.55), 6, "hide_ceil"),
    Case(2, (33, 31), (0.9, 0.2)),
    Case(0, (14, 14), ()),
    Case(0, (14, 14), 0.75),
]

BENCH = [Case(b, (14, 14), 0.75) for b in (64, 256, 4096)] + [
    Case(128, (48, 48), 0.6, 8, "hide_ceil"),
    Case(256, (32, 32), 0.75),
]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of mask_plan for one case: scattered sample ids up to 2^62, a large seed, an epoch per sample."""
    ids = torch.randint(2**62, (case.batch,), device=device)
    epochs = torch.randint(1000, (case.batch,), device=device)
    return case._asdict() | {"sample_ids": ids, "epoch": epochs, "seed": 2**64 - 59}


def assert_same(found: Any, wanted: Any) -> None:
    """Two plans agree to the bit, in dtype too."""
    assert len(found) == len(wanted)
    for name, a, b in zip(wanted._fields, found, wanted):
        if b is None:
            assert a is None, f"{name} is not None"
        else:
            assert a.dtype == b.dtype, f"{name} has {a.dtype}, expected {b.dtype}"
            assert torch.equal(a, b), f"{name} differs"


def garbage(tensors: Any) -> list[Tensor]:
    """Tensors like these, filled with what no op writes: an element left out is seen."""
    return [torch.full_like(t, t.dtype == torch.bool or -7) for t in tensors if t is not None]


def native_core(impl: str, device: str) -> tuple[ModuleType, str]:
    """The core that has `impl` ("emulated": the CUDA code on the CPU) and its name there; skips where it cannot run."""
    import pytest

    if impl == "emulated":
        reason = emulated.why_not()
        if reason is not None:
            pytest.skip(reason)
        return emulated.core(), "cuda"
    skip_unless(impl, device)
    core = _native.core()
    assert core is not None
    return core, impl
