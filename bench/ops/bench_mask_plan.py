"""Speed of mask_plan against the chain MAE runs today, eager and compiled. `python bench/ops/bench_mask_plan.py`

A contestant of ours gets a speed only when it equals the reference to the bit; the chain draws from torch's generator,
so its masks are others and only their counts are checked.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast.ops.mask_plan import IMPLS, mask_plan
from mimfast.testing.exact import Bench, Peer, main
from mimfast.testing.mask_plan import BENCH, Case, make

CASES = BENCH if torch.cuda.is_available() else [case for case in BENCH if case.batch <= 256]


def chain(x_BL1: Tensor, units: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The usual random masking: noise, two sorts, and a gather for the mask.

    Expanding units larger than a token to tokens is left out, in the chain's favour.
    """
    noise = torch.rand(x_BL1.shape[0], units, device=x_BL1.device)
    order = torch.argsort(noise, dim=1)
    restore = torch.argsort(order, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return order[:, :keep], torch.gather(mask, 1, restore), restore


def peers(case: Case, args: dict[str, Any], wanted: Any) -> dict[str, Peer]:
    units = case.grid[0] * case.grid[1] // case.unit**2
    keep = wanted.keep.shape[1] // case.unit**2
    like = torch.empty(case.batch, 1, device=args["sample_ids"].device)

    def right(found: Any) -> bool:
        return bool((found[1].sum(1) == units - keep).all())

    chains = {"eager": chain, "compiled": torch.compile(chain)}
    return {name: Peer(partial(fn, like, units, keep), right) for name, fn in chains.items()}


if __name__ == "__main__":
    sys.exit(main(Bench("mask_plan", mask_plan, IMPLS, CASES, make, peers)))
