"""The benchmark of an op whose answer has no rounding: ours is right when it equals the reference to the bit.

What users have today draws its random numbers elsewhere, so its masks are others; it brings a check of its own.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch

from mimfast.ops._choice import why_not_on
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

Call = Callable[[], Any]
KEYS = ("median_us", "p95_us", "gbps", "times_yardstick", "launched_us")


class Peer(NamedTuple):
    """What users have today: its call, and whether what it returned is right."""

    call: Call
    right: Callable[[Any], bool]
    graphed: bool = True  # whether it can be captured in a CUDA graph


class Bench(NamedTuple):
    """One op's benchmark."""

    op: str
    fn: Callable[..., Any]  # takes impl=
    impls: tuple[str, ...]
    cases: Iterable[Any]
    make: Callable[[Any, str], dict[str, Any]]  # (case, device) -> arguments
    peers: Callable[[Any, dict[str, Any], Any], dict[str, Peer]]  # (case, arguments, the reference's answer) -> peers
    yardstick: str = "compiled"  # every speed is also given as a ratio to this contestant's
    compile_ref: bool = True


def run_case(bench: Bench, case: Any, device: str, rounds: int) -> list[dict[str, Any]]:
    """Race one case; print and return its rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    args = bench.make(case, device)
    wanted = bench.fn(**args, impl="ref")
    peers = bench.peers(case, args, wanted)
    calls = {name: peer.call for name, peer in peers.items()}
    if bench.compile_ref:
        calls["ref compiled"] = partial(torch.compile(partial(bench.fn, impl="ref")), **args)
    calls |= {impl: partial(bench.fn, **args, impl=impl) for impl in bench.impls if why_not_on(impl, device) is None}
    right = {
        name: peers[name].right(call()) if name in peers else _same(call(), wanted) for name, call in calls.items()
    }
    calls = {name: call for name, call in calls.items() if right[name]}
    graphs = {n: call if n in peers and not peers[n].graphed else as_graph(call) for n, call in calls.items()}
    times = race(graphs, rounds)
    launched = race(calls, rounds) if device == "cuda" else times
    bytes_moved = sum(t.numel() * t.element_size() for t in wanted if isinstance(t, torch.Tensor))
    heads = ("median us", "p95 us", "GB/s", f"x {bench.yardstick}", "launched us")
    print(f"\n{case}\n{'contestant':14s}" + "".join(f"{head:>12s}" for head in heads) + "  answer")
    rows = []
    for name, good in right.items():
        row: dict[str, Any] = {"case": str(case), "pass": "fwd", "contestant": name, "out_of_tolerance": not good}
        line = f"{name:14s}no speed: wrong answer"
        if good:
            median = times[name].median_us
            row |= {"median_us": median, "p95_us": times[name].p95_us, "launched_us": launched[name].median_us}
            row |= {"gbps": bytes_moved / median / 1e3, "times_yardstick": times[bench.yardstick].median_us / median}
            answer = "counts right" if name in peers else "equal to ref"
            line = f"{name:14s}" + "".join(f"{row[key]:12.2f}" for key in KEYS) + f"  {answer}"
        print(line)
        rows.append(row)
    return rows


def _same(found: Any, wanted: Any) -> bool:
    return all(torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b for a, b in zip(found, wanted))


def main(bench: Bench) -> int:
    """Run from the command line; 1 when an answer is wrong."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {bench.op}.")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=50 if torch.cuda.is_available() else 15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine()
    head = f"{bench.op} on {where['device']}, {where['threads']} threads, torch {where['torch']}"
    print(f"{head}, {options.rounds} rounds")
    rows = [row for case in bench.cases for row in run_case(bench, case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": bench.op, "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0
