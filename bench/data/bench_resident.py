"""Crops per second of later epochs with the images in memory (--data.cache host) against decoding them each time.

    python bench/data/bench_resident.py --data STORE [--size 128] [--cache-side 128] [--workers 1] [--gpu] [--json FILE]

One loader for each contestant, all of one source, seed and size: without a cache, with the images in the memory of the
machine (with --gpu also of the GPU, which makes the crops), and all again with crops out of square copies. A cache is
full before anything is measured; the contestants take turns within one process, and the median of the rounds is printed
with the extremes. The small cache of decoded images that a loader has of its own is off. A source that does not know
the sizes of its images (a folder) is measured with copies only.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from mimfast.data.cpu import usable_cpus
from mimfast.data.loader import Loader
from mimfast.data.resident import Resident
from mimfast.data.sources import Source, open_source, shapes_of


def contestants(source: Source, args: argparse.Namespace) -> dict[str, Loader]:
    """name -> a loader, which is in its second epoch where it has a cache."""
    kinds: dict[str, Resident | None] = {}
    places = {"host": "cpu", "gpu": "cuda"} if args.gpu else {"host": "cpu"}
    if shapes_of(source) is not None:
        kinds |= {"none": None, **{name: Resident(source, device) for name, device in places.items()}}
    if args.cache_side:
        side = args.cache_side
        kinds[f"none, side {side}"] = Resident(source, None, side)
        kinds |= {f"{name}, side {side}": Resident(source, device, side) for name, device in places.items()}
    loaders = {}
    for name, resident in kinds.items():
        options = {"workers": args.workers, "cache_bytes": 0, "resident": resident, "pin": args.gpu}
        loaders[name] = Loader(source, args.size, args.batch_size, 0, **options)
        if not name.startswith("none"):
            for _ in range(-(-len(source) // args.batch_size)):
                next(loaders[name])
    return loaders


def rate(loader: Loader, seconds: float) -> float:
    """Images per second over about `seconds`, once what was prepared ahead is used up."""
    for _ in range(3):
        next(loader)
    _finish()
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += len(next(loader).img)
    _finish()
    return images / (time.perf_counter() - began)


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a store, or anything else that mimfast reads")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--cache-side", type=int, default=128, help="0: no copies")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="also in the memory of the GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(args.data)
    loaders = contestants(source, args)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.rounds):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, args.seconds))
    for loader in loaders.values():
        loader.close()
    print(f"{len(source)} images, crops of {args.size}, {args.workers} workers, {usable_cpus():g} CPUs")
    print(f"{'cache':<16} {'img/s':>9} {'least':>9} {'most':>9}  against none")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        ratio = medians[name] / medians[name.replace("host", "none").replace("gpu", "none")]
        print(f"{name:<16} {medians[name]:9.0f} {min(found):9.0f} {max(found):9.0f}  {ratio:.2f}x")
    if args.json:
        record = {
            **{key: getattr(args, key) for key in ("size", "cache_side", "batch_size", "workers")},
            "images": len(source),
            "cpus": usable_cpus(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "images_per_second": {n: {"median": medians[n], "least": min(f), "most": max(f)} for n, f in rates.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
