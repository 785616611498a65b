"""Speed of local_norm against three average poolings, as SimMIM's users run them, eager and compiled.

`python bench/ops/bench_local_norm.py [--json FILE]`: 192 px, window 47. Error is the largest absolute one against
average pooling in fp64; "values" counts three channels.
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
from mimfast.ops.local_norm import IMPLS, local_norm
from mimfast.testing import FLOOR_ULPS
from mimfast.testing.local_norm import BENCH, BENCH_CPU, Case, make, pooled
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

HEAD = ("median us", "p95 us", "launched us", "ns/value", "x eager", "x compiled")


def contestants(device: str) -> dict[str, Callable[..., Tensor]]:
    ours = {impl: partial(local_norm, impl=impl) for impl in IMPLS if why_not_on(impl, device) is None}
    return {"eager": pooled, "compiled": torch.compile(pooled, dynamic=False)} | ours


def run_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Judge the errors, race those that are right, print and return the rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    args, fns = make(case, device), contestants(device)
    part = {"img": args["img"][:2], "window": case.window}
    wide = normalize(part["img"], dtype=torch.float64).double()
    truth = pooled(wide, case.window, torch.float64)
    errors = {name: (fn(**part).double() - truth).abs().max().item() for name, fn in fns.items()}
    allowed = 2 * errors["eager"] + FLOOR_ULPS * torch.finfo(torch.float32).eps * truth.abs().max().item()
    torch._dynamo.reset()
    calls = {name: partial(fn, **args) for name, fn in contestants(device).items() if errors[name] <= allowed}
    times = race({name: as_graph(call) for name, call in calls.items()}, rounds, warmup=1)
    launched = race(calls, rounds) if device == "cuda" else times
    print(f"\n{case}\n{'contestant':12s}" + "".join(f"{head:>12s}" for head in HEAD) + "  max error of allowed")
    rows = []
    for name in fns:
        row: dict[str, Any] = {"case": str(case), "pass": "fwd", "contestant": name, "error": errors[name]}
        row |= {"allowed": allowed, "out_of_tolerance": name not in times}
        if name in times:
            us = times[name].median_us
            row |= {"median_us": us, "p95_us": times[name].p95_us, "launched_us": launched[name].median_us}
            row |= {"ns_per_value": 1e3 * us / args["img"].numel(), "times_eager": times["eager"].median_us / us}
            row |= {"times_compiled": times["compiled"].median_us / us if "compiled" in times else float("nan")}
            keys = ("median_us", "p95_us", "launched_us", "ns_per_value", "times_eager", "times_compiled")
            print(f"{name:12s}" + "".join(f"{row[k]:12.2f}" for k in keys) + f"  {errors[name]:.1e} of {allowed:.1e}")
        else:
            print(f"{name:12s}{'no speed: out of tolerance':72s}  {errors[name]:.1e} of {allowed:.1e}")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=30 if torch.cuda.is_available() else 3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(
        f"local_norm on {where['device']}, {where['threads']} threads, torch {where['torch']}, {options.rounds} rounds"
    )
    cases = BENCH if device == "cuda" else BENCH_CPU
    rows = [row for case in cases for row in run_case(case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": "local_norm", "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
