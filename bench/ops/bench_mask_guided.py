"""Speed of mask_guided against multinomial and sorts, eager and compiled. `python bench/ops/bench_mask_guided.py`

A contestant of ours gets a speed only when it equals the reference to the bit; torch.multinomial draws other masks, and
only their counts are checked.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast.ops.mask_guided import IMPLS, mask_guided
from mimfast.testing.exact import Bench, Peer, main
from mimfast.testing.mask_guided import BENCH, Case, make


def chain(importance: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The usual guided masking: a biased permutation of all patches, its inverse, and a gather for the mask."""
    order = torch.multinomial(importance, importance.shape[1], replacement=False)
    restore = torch.argsort(order, dim=1)
    mask = torch.ones_like(importance)
    mask[:, :keep] = 0
    return order[:, :keep], torch.gather(mask, 1, restore), restore


def peers(case: Case, args: dict[str, Any], wanted: Any) -> dict[str, Peer]:  # noqa: ARG001
    keep, hidden = wanted.keep.shape[1], wanted.hide.shape[1]

    def right(found: Any) -> bool:
        return bool((found[1].sum(1) == hidden).all())

    chains = {"eager": chain, "compiled": torch.compile(chain)}
    return {name: Peer(partial(fn, args["importance"], keep), right) for name, fn in chains.items()}


if __name__ == "__main__":
    sys.exit(main(Bench("mask_guided", mask_guided, IMPLS, BENCH, make, peers)))
