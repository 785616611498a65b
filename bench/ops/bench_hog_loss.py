"""Speed of hog_loss, forward and backward, against the usual torch layer with a masked loss, and against hog alone.

`python bench/ops/bench_hog_loss.py [--json FILE] [--rounds N]`. "eager" is the layer of mimfast.testing.hog on the
normalised image, hidden tokens picked by boolean index or gather, squared error, backward; "compiled" is torch.compile
of the same with weights in place of boolean indices. "hog" is our hog by the same implementation for the same tokens
(all of them beside a map), which stores the target and has no loss; goal: hog_loss at most 1.3 times as long. "usual
error" is how far the loss is from that of the layer, whose float arithmetic gives another target (RMS about 0.01).
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
from mimfast.ops.hog import hog
from mimfast.ops.hog_loss import IMPLS, hog_loss, hog_loss_ref
from mimfast.testing import compare
from mimfast.testing.hog_loss import BENCH, BENCH_CPU, Case, make, usual, usual_weighted
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

HEAD = ("median us", "p95 us", "launched us", "img/s", "x eager", "x compiled", "of hog")


def with_gradient(fn: Callable[..., Tensor], args: dict[str, Any]) -> Callable[[], object]:
    upstream = torch.ones((), device=args["pred"].device)
    return lambda: torch.autograd.grad(fn(**args), args["pred"], upstream)


def contestants(args: dict[str, Any], device: str) -> dict[str, Callable[[], object]]:
    weighted = torch.compile(usual_weighted, dynamic=False)
    found = {"eager": with_gradient(usual, args), "compiled": with_gradient(weighted, args)}
    hidden = args["hidden"] if args["hidden"].dtype == torch.int64 else None
    for impl in [i for i in IMPLS if why_not_on(i, device) is None and i != "ref"]:
        found[f"hog {impl}"] = partial(hog, args["img"], stride=args["patch"], hidden=hidden, impl=impl)
        found[impl] = with_gradient(partial(hog_loss, impl=impl), args)
    return found


def run_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Judge the errors, race, print and return the rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    args = make(case, device)
    calls = contestants(args, device)
    errors = {i: compare(partial(hog_loss, impl=i), hog_loss_ref, args) for i in IMPLS if i in calls}
    want = usual(**args).item()
    times = race({name: as_graph(call) for name, call in calls.items() if name != "eager"}, rounds)
    times |= race({"eager": calls["eager"]}, max(3, rounds // 4))  # its boolean index waits for the GPU: no graph
    launched = race(calls, rounds) if device == "cuda" else times
    print(f"\n{case}\n{'contestant':12s}" + "".join(f"{head:>12s}" for head in HEAD) + "  usual error, max error")
    rows = []
    for name in calls:
        us, ours = times[name].median_us, name in errors
        row: dict[str, Any] = {"case": str(case), "pass": "fwd" if name.startswith("hog ") else "fwd+bwd"}
        row |= {"contestant": name, "median_us": us, "p95_us": times[name].p95_us}
        row |= {"launched_us": launched[name].median_us, "img_s": 1e6 * case.batch / us}
        row |= {"times_eager": times["eager"].median_us / us, "times_compiled": times["compiled"].median_us / us}
        row["of_hog"] = us / times[f"hog {name}"].median_us if ours else float("nan")
        row["usual_error"] = abs(hog_loss(**args, impl=name).item() / want - 1) if ours else 0.0
        row["errors"] = [e._asdict() for e in errors.get(name, [])]
        row["out_of_tolerance"] = any(e["kernel"] > e["allowed"] for e in row["errors"])
        keys = ("median_us", "p95_us", "launched_us", "img_s", "times_eager", "times_compiled", "of_hog")
        text = ", ".join(f"{e['kernel']:.1e} of {e['allowed']:.1e}" for e in row["errors"])
        print(f"{name:12s}" + "".join(f"{row[k]:12.2f}" for k in keys) + f"  {row['usual_error']:.1e}, {text}")
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=30 if torch.cuda.is_available() else 7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(f"hog_loss on {where['device']}, {where['threads']} threads, torch {where['torch']}, {options.rounds} rounds")
    cases = BENCH if device == "cuda" else BENCH_CPU
    rows = [row for case in cases for row in run_case(case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": "hog_loss", "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
