"""Speed of crop_gather against what it stands for: crop_resize of everything, then patch_gather of the kept patches.

`python bench/ops/bench_crop_gather.py [--json FILE]`: random boxes of MAE's area and aspect, to 224 pixels and patches
of 16, from raw squares of 256 and from 500 x 375, a quarter of the patches kept, and all of them. "torchvision" crops
with torchvision v2 (antialias), image by image, and then gathers as the official MAE code does. On a CPU with one
thread, then with all. "other" is the share of values that differ from the composition of our references at all; what
has more than the share allowed has no speed.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast._images import normalize
from mimfast.ops._choice import why_not_on
from mimfast.ops.crop_gather import IMPLS, crop_gather
from mimfast.testing import crop_resize as crops
from mimfast.testing.crop_gather import BENCH, Case, composed, make
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

# torchvision's weights have another last bit, and some of its pixels are a grey level away
ALLOWED = {"torchvision": 0.15}


def torchvision(keep: Tensor, patch: int, order: str, dtype: torch.dtype, **crop: Any) -> Tensor:
    """Every patch of every image, normalised, then those that are kept; values in (p, q, c) order."""
    assert order == "pqc"
    square = crops.torchvision(crop)
    grid = square.shape[2] // patch
    tiles = normalize(square, dtype=dtype).unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
    rows = torch.einsum("bcypxq->byxpqc", tiles).reshape(len(square), grid * grid, -1)
    return rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[2]))


def run_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Judge the differences, race those that are right, print and return the rows."""
    torch.manual_seed(0)
    args = make(case, device)
    able = [impl for impl in IMPLS if impl != "ref" and why_not_on(impl, device) is None]
    fns: dict[str, Callable[[], Tensor]] = {impl: partial(crop_gather, **args, impl=impl) for impl in able}
    fns |= {"composition": partial(composed, **args), "torchvision": partial(torchvision, **args)}
    want = composed(**{k: v.cpu() if isinstance(v, Tensor) else v for k, v in args.items()}, impl="ref")
    other = {name: (fn().cpu() != want).float().mean().item() for name, fn in fns.items()}
    right = [name for name in fns if other[name] <= ALLOWED.get(name, 0.0)]
    times = race({n: fns[n] if n == "torchvision" else as_graph(fns[n]) for n in right}, rounds, warmup=2)
    print(f"\n{case}, {torch.get_num_threads()} threads\n{'contestant':12s}{'us/image':>10s}{'p95':>10s}", end="")
    print(f"{'images/s':>10s}{'x composition':>15s}  other")
    rows = []
    for name in fns:
        row: dict[str, Any] = {"case": str(case), "contestant": name, "threads": torch.get_num_threads()}
        row |= {"pass": "fwd", "error": other[name], "out_of_tolerance": name not in times}
        if name in times:
            us, p95 = (value / case.crop.batch for value in times[name][:2])
            row |= {"us_per_image": us, "p95_us_per_image": p95}
            row["times_composition"] = times["composition"].median_us / case.crop.batch / us
            print(f"{name:12s}{us:10.1f}{p95:10.1f}{1e6 / us:10.0f}{row['times_composition']:15.2f}  {other[name]:.1e}")
        else:
            print(f"{name:12s}{'no speed: other values':45s}  {other[name]:.1e}")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=30 if torch.cuda.is_available() else 11)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(f"crop_gather on {where['device']}, torch {where['torch']}, {options.rounds} rounds")
    rows = []
    for threads in sorted({1, torch.get_num_threads()}) if device == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        rows += [row for case in BENCH for row in run_case(case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": "crop_gather", "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows if row["contestant"] != "torchvision") else 0


if __name__ == "__main__":
    sys.exit(main())
