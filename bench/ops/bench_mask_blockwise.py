"""Speed of mask_blockwise against the loop data loaders run today. `python bench/ops/bench_mask_blockwise.py`

The peer makes one mask after the other in Python and NumPy, as one loader worker does, and the index lists with torch;
its masks are others, and only their counts are checked.
"""

import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from mimfast.ops.mask_blockwise import IMPLS, mask_blockwise
from mimfast.testing.exact import Bench, Peer, main
from mimfast.testing.mask_blockwise import BENCH, Case, make


def one_mask(rows: int, cols: int, count: int, least: int, exact: bool) -> np.ndarray:
    """The published algorithm from its description, with slices instead of loops over cells."""
    hidden, room = np.zeros((rows, cols), dtype=bool), count
    while room > 0:
        for _ in range(10):
            area = random.uniform(least, room)
            aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= rows or w >= cols:
                continue
            top, left = random.randint(0, rows - h), random.randint(0, cols - w)
            block = hidden[top : top + h, left : left + w]
            added = h * w - int(block.sum())
            if 0 < added <= room:
                block[:] = True
                room -= added
                break
        else:
            break
    if exact and room > 0:
        hidden.reshape(-1)[np.random.choice(np.flatnonzero(~hidden), room, replace=False)] = True
    return hidden


def loop(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    masks = np.stack([one_mask(*case.grid, case.most, case.min_block, case.exact) for _ in range(case.batch)])
    hidden = torch.from_numpy(masks).flatten(1).to(device)
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    return hidden, order, order.argsort(dim=1)


def peers(case: Case, args: dict[str, Any], wanted: Any) -> dict[str, Peer]:  # noqa: ARG001
    def right(found: Any) -> bool:
        counts = found[0].sum(1)
        return bool((counts == case.most).all() if case.exact else (counts <= case.most).all())

    return {"loop": Peer(partial(loop, case, args["sample_ids"].device.type), right, graphed=False)}


if __name__ == "__main__":
    bench = Bench("mask_blockwise", mask_blockwise, IMPLS, BENCH, make, peers, yardstick="loop", compile_ref=False)
    sys.exit(main(bench))
