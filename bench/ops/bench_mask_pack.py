"""Speed of mask_pack against two sorts, or boolean indexing for ragged rows. `python bench/ops/bench_mask_pack.py`"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast.ops.mask_pack import IMPLS, mask_pack
from mimfast.testing.exact import Bench, Peer, main
from mimfast.testing.mask_pack import BENCH, Case, make


def sorts(hidden: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal counts: the order by a stable sort, its inverse by another."""
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :visible].contiguous(), order.argsort(dim=1), order[:, visible:].contiguous()


def indexing(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differing counts: nonzero, which waits for the device."""
    kept = ~hidden
    inverse = hidden.to(torch.uint8).argsort(dim=1, stable=True).argsort(dim=1)
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return kept.nonzero()[:, 1], inverse, hidden.nonzero()[:, 1], cu_seqlens


def peers(case: Case, args: dict[str, Any], wanted: Any) -> dict[str, Peer]:
    if case.visible is None:

        def right(found: Any) -> bool:
            keep, inverse, hide, cu_seqlens = found
            same = torch.equal(inverse, wanted.inverse) and torch.equal(cu_seqlens, wanted.cu_seqlens)
            return same and torch.equal(keep, wanted.keep[: len(keep)]) and torch.equal(hide, wanted.hide[: len(hide)])

        return {"eager": Peer(partial(indexing, args["hidden"]), right, graphed=False)}

    def equal(found: Any) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, (wanted.keep, wanted.inverse, wanted.hide)))

    chains = {"eager": sorts, "compiled": torch.compile(sorts)}
    return {name: Peer(partial(fn, args["hidden"], case.visible), equal) for name, fn in chains.items()}


if __name__ == "__main__":
    sys.exit(main(Bench("mask_pack", mask_pack, IMPLS, BENCH, make, peers, yardstick="eager")))
