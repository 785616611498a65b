"""What every op benchmark does: judge each contestant's error first, then race those that are right.

A bench/ops/bench_<op>.py brings cases, contestants and the bytes a case must move, and calls `main`.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.testing import Error, compare
from mimfast.testing.racing import Times, as_graph, race
from mimfast.testing.record import machine, write_record

Args = dict[str, Any]
Fn = Callable[..., Tensor]
HEAD = f"{'':9s}{'contestant':14s} median us    p95 us    GB/s x yardstick  launched us  max error"


class Bench(NamedTuple):
    """One op's benchmark."""

    op: str
    cases: Iterable[Any]
    make: Callable[[Any, str], Args]  # (case, device) -> arguments
    ref: Fn
    contestants: Callable[[str], dict[str, Fn]]  # device -> name -> function of the arguments
    bytes_moved: Callable[
        [Args, bool], int
    ]  # (arguments, with the gradient?) -> bytes that no implementation can avoid
    yardstick: str = "compiled"  # every time is also given as a ratio to this contestant's


def main(bench: Bench) -> int:
    """Run from the command line; 1 when an implementation of ours is out of tolerance."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {bench.op}.")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=50 if torch.cuda.is_available() else 7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    print(
        f"{bench.op} on {where['device']}, {where['threads']} threads, torch {where['torch']}, {options.rounds} rounds"
    )
    rows = [row for case in bench.cases for row in run_case(bench, case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": bench.op, "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


def run_case(bench: Bench, case: Any, device: str, rounds: int) -> list[dict[str, Any]]:
    """Race one case, forward and forward with backward; print and return its rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # or the compiled contestants fall back to eager after some shapes
    args = bench.make(case, device)
    fns = bench.contestants(device)
    print(f"\n{case}\n{HEAD}")
    errors = {}
    for name, fn in fns.items():
        try:
            errors[name] = compare(fn, bench.ref, args)
        except UserError as refusal:
            print(f"{name}: refused: {refusal}")
    fns = {name: fns[name] for name in errors}
    rows = []
    for with_gradient in (False, True):
        calls = {name: _call(fn, args, with_gradient) for name, fn in fns.items() if _right(errors[name])}
        times = race({name: as_graph(call) for name, call in calls.items()}, rounds)
        launched = race(calls, rounds) if device == "cuda" else times
        bytes_moved = bench.bytes_moved(args, with_gradient)
        for name in fns:
            row: dict[str, Any] = {"case": str(case), "pass": "fwd+bwd" if with_gradient else "fwd", "contestant": name}
            row |= {"errors": [e._asdict() for e in errors[name]], "out_of_tolerance": not _right(errors[name])}
            if name in times:
                row |= _speed(times[name], launched[name], bytes_moved, times.get(bench.yardstick))
            print(_line(row))
            rows.append(row)
    return rows


def _right(errors: list[Error]) -> bool:
    return all(e.kernel <= e.allowed for e in errors)


def _call(fn: Fn, args: Args, with_gradient: bool) -> Callable[[], object]:
    if not with_gradient:
        still = {k: v.detach() if isinstance(v, Tensor) else v for k, v in args.items()}
        return lambda: fn(**still)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    shape = fn(**args)
    upstream = torch.ones_like(shape)
    return lambda: torch.autograd.grad(fn(**args), leaves, upstream)


def _speed(times: Times, launched: Times, bytes_moved: int, yardstick: Times | None) -> dict[str, float | None]:
    return {
        "median_us": times.median_us,
        "p95_us": times.p95_us,
        "launched_us": launched.median_us,
        "gbps": bytes_moved / times.median_us / 1e3,
        "times_yardstick": yardstick.median_us / times.median_us if yardstick else None,
    }


def _line(row: dict[str, Any]) -> str:
    error = ", ".join(f"{e['kernel']:.1e} of {e['allowed']:.1e}" for e in row["errors"])
    head = f"{row['pass']:9s}{row['contestant']:14s}"
    if row["out_of_tolerance"]:
        return f"{head}{'no speed: out of tolerance':52s}  {error}"
    ratio = f"{row['times_yardstick']:.2f}" if row["times_yardstick"] else "-"
    speed = f"{row['median_us']:10.1f}{row['p95_us']:10.1f}{row['gbps']:8.1f}{ratio:>11s}{row['launched_us']:13.1f}"
    return f"{head}{speed}  {error}"
