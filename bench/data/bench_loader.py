"""Decode + random resized crop, images per second: mimfast's loader against torch's DataLoader with torchvision.

    python bench/data/bench_loader.py --data DIR [--size 224] [--batch-size 64] [--workers 0 1 2 4] [--json FILE]

Both read the same files in a random order and give uint8 batches of bicubic, antialiased crops (scale 0.2 to 1, flip).
The contestants take turns within one process, each round starts their workers anew (outside the measured time), and the
median of the rounds is printed with the extremes. mimfast's cache of decoded images is off: every image is decoded.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import torch
from PIL import Image

from mimfast.data.cpu import usable_cpus
from mimfast.data.loader import Loader
from mimfast.data.sources import Folder


class _Files(torch.utils.data.Dataset):
    """What a user writes with torchvision: open, convert, transform."""

    def __init__(self, source: Folder, transform: Callable) -> None:
        self.paths = [str(source.path / source.name(i)) for i in range(len(source))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def ours(source: Folder, size: int, batch_size: int, workers: int) -> Iterator[int]:
    with Loader(source, size, batch_size, seed=0, workers=workers, cache_bytes=0) as loader:
        for batch in loader:
            yield len(batch.img)


def theirs(source: Folder, size: int, batch_size: int, workers: int) -> Iterator[int]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    dataset = _Files(source, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 30)
    for batch in torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers):
        yield len(batch)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over about `seconds`, after two batches of warm-up."""
    next(batches), next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += next(batches)
    elapsed = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return images / elapsed


def measure(source: Folder, args: argparse.Namespace) -> list[dict]:
    contestants: dict[str, Callable[..., Iterator[int]]] = {"mimfast": ours}
    try:
        import torchvision  # noqa: F401

        contestants["torchvision"] = theirs
    except ImportError:
        print("torchvision is not installed: no comparison", file=sys.stderr)
    cases = [(name, workers) for workers in args.workers for name in contestants]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for name, workers in cases:
            batches = contestants[name](source, args.size, args.batch_size, workers)
            rates[name, workers].append(rate(batches, args.seconds))
    return [
        {
            "loader": name,
            "workers": workers,
            "images_per_second": statistics.median(found),
            "least": min(found),
            "most": max(found),
        }
        for (name, workers), found in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = Folder(args.data)
    rows = measure(source, args)
    peer = {row["workers"]: row["images_per_second"] for row in rows if row["loader"] == "torchvision"}
    print(f"{len(source)} images, crops of {args.size}, batches of {args.batch_size}, {usable_cpus():g} CPUs")
    print(f"{'loader':<12} {'workers':>7} {'img/s':>9} {'least':>9} {'most':>9}  against torchvision")
    for row in rows:
        ratio = row["images_per_second"] / peer[row["workers"]] if row["workers"] in peer else float("nan")
        numbers = " ".join(f"{row[key]:9.1f}" for key in ("images_per_second", "least", "most"))
        print(f"{row['loader']:<12} {row['workers']:>7} {numbers}  {ratio:.2f}x")
    if args.json:
        record = {
            "images": len(source),
            "size": args.size,
            "batch_size": args.batch_size,
            "cpus": usable_cpus(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "results": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
