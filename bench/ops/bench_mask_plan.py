"""Speed of mask_plan against the chain MAE runs today, eager and compiled. `python bench/ops/bench_mask_plan.py`

A contestant of ours gets a speed only when it equals the reference to the bit; the chain draws from torch's generator,
so its masks are others and only their counts are checked.
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

from mimfast.ops._choice import why_not_on
from mimfast.ops.mask_plan import IMPLS, mask_plan
from mimfast.testing.mask_plan import BENCH, Case, make
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

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


def contestants(case: Case, device: str, wanted: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, bool]]:
    """Calls by name, and whether each one's answer is right."""
    args = make(case, device)
    units = case.grid[0] * case.grid[1] // case.unit**2
    keep = wanted.keep.shape[1] // case.unit**2
    like = torch.empty(case.batch, 1, device=device)
    ours = [impl for impl in IMPLS if why_not_on(impl, device) is None]
    calls: dict[str, Callable[[], Any]] = {"eager": partial(chain, like, units, keep)}
    calls["compiled"] = partial(torch.compile(chain), like, units, keep)
    calls["ref compiled"] = partial(torch.compile(partial(mask_plan, impl="ref")), **args)
    calls |= {impl: partial(mask_plan, **args, impl=impl) for impl in ours}
    right = {}
    for name, call in calls.items():
        found = call()
        if name in ("eager", "compiled"):
            right[name] = bool((found[1].sum(1) == units - keep).all())
        else:
            right[name] = all(torch.equal(a, b) for a, b in zip(found, wanted))
    return calls, right


def run_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    wanted = mask_plan(**make(case, device), impl="ref")
    torch.manual_seed(0)
    calls, right = contestants(case, device, wanted)
    bytes_moved = sum(t.numel() * t.element_size() for t in wanted) + 16 * case.batch
    calls = {name: call for name, call in calls.items() if right[name]}
    times = race({name: as_graph(call) for name, call in calls.items()}, rounds)
    launched = race(calls, rounds) if device == "cuda" else times
    heads = ("median us", "p95 us", "GB/s", "x compiled", "launched us")
    print(f"\n{case}\n{'contestant':14s}" + "".join(f"{head:>12s}" for head in heads) + "  answer")
    rows = []
    for name, good in right.items():
        row: dict[str, Any] = {"case": str(case), "pass": "fwd", "contestant": name, "out_of_tolerance": not good}
        if good:
            median = times[name].median_us
            row |= {"median_us": median, "p95_us": times[name].p95_us, "launched_us": launched[name].median_us}
            row |= {"gbps": bytes_moved / median / 1e3, "times_yardstick": times["compiled"].median_us / median}
            keys = ("median_us", "p95_us", "gbps", "times_yardstick", "launched_us")
            numbers = "".join(f"{row[key]:12.2f}" for key in keys)
        answer = "counts right" if name in ("eager", "compiled") else "equal to ref"
        print(f"{name:14s}{numbers}  {answer}" if good else f"{name:14s}no speed: differs from ref")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=50 if torch.cuda.is_available() else 15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(
        f"mask_plan on {where['device']}, {where['threads']} threads, torch {where['torch']}, {options.rounds} rounds"
    )
    rows = [row for case in CASES for row in run_case(case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": "mask_plan", "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
