"""Speed of noop against torch's copy. `python bench/ops/bench_noop.py [--json FILE]`"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mimfast.ops._choice import why_not_on
from mimfast.ops.noop import IMPLS, noop, noop_ref
from mimfast.testing.bench import Args, Bench, Fn, main
from mimfast.testing.noop import Case, make

CASES = [Case((1 << 16,)), Case((1 << 26,) if torch.cuda.is_available() else (1 << 22,))]


def contestants(device: str) -> dict[str, Fn]:
    ours = [impl for impl in IMPLS if why_not_on(impl, device) is None]
    return {"compiled": torch.compile(noop_ref, dynamic=False)} | {impl: partial(noop, impl=impl) for impl in ours}


def bytes_moved(args: Args, with_gradient: bool) -> int:  # noqa: ARG001
    return 2 * args["x"].numel() * 4  # the gradient is handed through, not copied


if __name__ == "__main__":
    sys.exit(main(Bench("noop", CASES, make, noop_ref, contestants, bytes_moved)))
