"""Speed of patch_gather alone, and of mask_plan + patch_gather, against the chain of the official MAE code.

`python bench/ops/bench_patch_gather.py [--json FILE]`. The chain normalises and patchifies every patch, then gathers
with an index expanded to the width of a row; for a mask it draws noise and sorts twice. A contestant that draws a mask
hands back the indices it kept: its rows are judged, against fp64, by those.
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

from mimfast._images import IMAGENET_MEAN, IMAGENET_STD
from mimfast.ops import mask_plan
from mimfast.ops._choice import why_not_on
from mimfast.ops.patch_gather import IMPLS, patch_gather, patch_gather_ref
from mimfast.testing import FLOOR_ULPS
from mimfast.testing.patch_gather import BENCH, Case, make
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

CASES = [case for case in BENCH if torch.cuda.is_available() or case.batch <= 64]
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
HEAD = ("median us", "p95 us", "launched us", "GB/s", "x eager", "x compiled")

Rows = tuple[Tensor, Tensor]  # rows (B, K, D), the indices they were taken from (B, K)


def patchify(img: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Every patch of every image, normalised: (B, L, D), values in (c, p, q) order."""
    if img.dtype == torch.uint8:
        img = (img.float() / 255 - MEAN) / STD
    B, _, H, W = img.shape
    tiles = img.to(dtype).reshape(B, 3, H // patch, patch, W // patch, patch)
    return torch.einsum("bcypxq->byxcpq", tiles).reshape(B, -1, 3 * patch * patch)


def take(rows_BLD: Tensor, keep_BK: Tensor) -> Tensor:
    return torch.gather(rows_BLD, 1, keep_BK.unsqueeze(-1).repeat(1, 1, rows_BLD.shape[-1]))


def chain(img: Tensor, keep: Tensor, patch: int, dtype: torch.dtype) -> Rows:
    return take(patchify(img, patch, dtype), keep), keep


def mask_chain(img: Tensor, keep: Tensor, patch: int, dtype: torch.dtype) -> Rows:
    """The same with a mask of its own; also makes the map and the inverse, as mask_plan does."""
    rows_BLD, K = patchify(img, patch, dtype), keep.shape[1]
    noise = torch.rand(rows_BLD.shape[:2], device=img.device)
    order = torch.argsort(noise, dim=1)
    restore = torch.argsort(order, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :K] = 0
    torch.gather(mask, 1, restore)
    return take(rows_BLD, order[:, :K]), order[:, :K]


def ours(img: Tensor, keep: Tensor, patch: int, dtype: torch.dtype, impl: str) -> Rows:
    return patch_gather(img, keep, patch=patch, dtype=dtype, impl=impl), keep  # type: ignore[arg-type]


def mask_ours(img: Tensor, keep: Tensor, patch: int, dtype: torch.dtype, impl: str, ratio: float) -> Rows:  # noqa: ARG001
    mask_impl = {"triton": "cuda"}.get(impl, impl)
    grid = (img.shape[2] // patch, img.shape[3] // patch)
    plan = mask_plan(len(img), grid, ratio, device=img.device, impl=mask_impl)  # type: ignore[arg-type]
    return patch_gather(img, plan.keep, patch=patch, dtype=dtype, impl=impl), plan.keep  # type: ignore[arg-type]


def contestants(group: str, case: Case, device: str) -> dict[str, Callable[..., Rows]]:
    """By name; those of ours are called as their implementation of patch_gather."""
    able = [impl for impl in IMPLS if why_not_on(impl, device) is None]
    if group == "mask + gather":
        eager, mine = mask_chain, partial(mask_ours, ratio=1 - case.kept)
        able = [i for i in able if i != "triton" or why_not_on("cuda", device) is None]
    else:
        eager, mine = chain, ours
    found: dict[str, Callable[..., Rows]] = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)}
    return found | {impl: partial(mine, impl=impl) for impl in able}


def error(rows: Tensor, keep: Tensor, args: dict[str, Any]) -> float:
    """Largest difference to the reference in fp64; infinite when the indices are not distinct ones of an image."""
    truth = patch_gather_ref(args["img"], keep, patch=args["patch"], dtype=torch.float64)
    return (rows.double() - truth).abs().max().item() if (keep.sort().values.diff() > 0).all() else float("inf")


def run_case(group: str, case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    args = make(case, device)
    del args["order"]
    fns = contestants(group, case, device)
    errors = {name: error(*fn(**args), args) for name, fn in fns.items()}
    largest = max((1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD))
    allowed = 2 * errors["eager"] + FLOOR_ULPS * torch.finfo(torch.float32).eps * largest
    right = {name: errors[name] <= allowed for name in fns}
    calls = {name: partial(fn, **args) for name, fn in fns.items() if right[name]}
    times = race({name: as_graph(call) for name, call in calls.items()}, rounds)
    launched = race(calls, rounds) if device == "cuda" else times
    values = args["keep"].numel() * 3 * case.patch**2
    bytes_moved = values * (args["img"].element_size() + args["dtype"].itemsize) + 8 * args["keep"].numel()
    print(f"\n{group} {case}\n{'contestant':12s}" + "".join(f"{head:>12s}" for head in HEAD) + "  max error of allowed")
    rows = []
    for name in fns:
        row: dict[str, Any] = {"case": f"{group} {case}", "pass": "fwd", "contestant": name}
        row |= {"error": errors[name], "allowed": allowed, "out_of_tolerance": not right[name]}
        if name in times:
            us = times[name].median_us
            row |= {"median_us": us, "p95_us": times[name].p95_us, "launched_us": launched[name].median_us}
            row |= {"gbps": bytes_moved / us / 1e3, "times_eager": times["eager"].median_us / us}
            row |= {"times_compiled": times["compiled"].median_us / us if "compiled" in times else float("nan")}
            keys = ("median_us", "p95_us", "launched_us", "gbps", "times_eager", "times_compiled")
            print(f"{name:12s}" + "".join(f"{row[k]:12.2f}" for k in keys) + f"  {errors[name]:.1e} of {allowed:.1e}")
        else:
            print(f"{name:12s}{'no speed: out of tolerance':72s}  {errors[name]:.1e} of {allowed:.1e}")
        rows.append(row)
    return rows


def main() -> int:
    global MEAN, STD
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=50 if torch.cuda.is_available() else 15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    MEAN, STD = MEAN.to(device), STD.to(device)
    where = machine()
    print(f"patch_gather on {where['device']}, {where['threads']} threads, torch {where['torch']}, ", end="")
    print(f"{options.rounds} rounds")
    groups = [(group, case) for group in ("mask + gather", "gather") for case in CASES]
    rows = [row for group, case in groups for row in run_case(group, case, device, options.rounds)]
    if options.json:
        write_record(options.json, {"op": "patch_gather", "rows": rows})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
