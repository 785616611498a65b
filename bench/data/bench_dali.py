"""Images per second of DALI on the CPU against what a user has without it, for the same photographs and crops.

    python bench/data/bench_dali.py --data DIR [--only 500x375] [--size 224] [--threads 1 2] [--json FILE]

- torchvision: torch's DataLoader, Pillow, v2.RandomResizedCrop (bicubic, antialias), flip; 0 or N worker processes.
- loader pillow, loader dali: mimfast's loader with 0 or N threads; its cache of decoded images is off.
- DALI parts: what DALI alone takes to decode the boxes of the crops, from files in memory (the loader's ceiling).
- DALI crops: the whole pipeline in DALI (decode, resize, flip), from files in memory, a batch under way meanwhile.
All take turns within one process, which is bound to as many CPUs as there are threads. The median of the rounds is
printed with the extremes, then how far the crops of DALI's pipeline are from those of the loader.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_loader import rate, theirs

from mimfast.data.crop import CropConfig, crop_boxes, crop_rows, crop_words
from mimfast.data.dali import DaliCrops, DaliParts
from mimfast.data.decode import decode
from mimfast.data.header import look
from mimfast.data.loader import Loader
from mimfast.data.sources import Folder


def loader(decoder: str, source: Folder, size: int, batch_size: int, workers: int) -> Iterator[int]:
    with Loader(source, size, batch_size, 0, workers=workers, cache_bytes=0, decoder=decoder) as batches:
        for batch in batches:
            yield len(batch.img)


class InMemory:
    """Batches of files with random boxes, one after the other without end."""

    def __init__(self, source: Folder, batch_size: int) -> None:
        found = [(file, look(file)) for file in (source.read(i) for i in range(len(source)))]
        self.files = [file for file, header in found if header.plain]
        self.sizes = np.array([(header.width, header.height) for _, header in found if header.plain])
        self.batch_size, self.next = batch_size, 0

    def batch(self) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
        epoch, ids = np.divmod(np.arange(self.next, self.next + self.batch_size), len(self.files))
        self.next += self.batch_size
        sizes = self.sizes[ids]
        boxes, flip = crop_boxes(crop_words(0, epoch, ids), sizes[:, 0], sizes[:, 1], CropConfig())
        return [self.files[i] for i in ids], boxes, flip, sizes[:, 0]


def parts(source: Folder, _: int, batch_size: int, threads: int) -> Iterator[int]:
    pipeline, files = DaliParts(batch_size, threads), InMemory(source, batch_size)
    while True:
        data, boxes, _, widths = files.batch()
        yield len(pipeline.run(data, boxes, widths))


def crops(source: Folder, size: int, batch_size: int, threads: int) -> Iterator[int]:
    pipeline, files = DaliCrops(size, batch_size, threads=threads), InMemory(source, batch_size)
    pipeline.feed(*files.batch()[:3])
    while True:
        pipeline.feed(*files.batch()[:3])
        yield len(pipeline.collect().img)


def measure(source: Folder, args: argparse.Namespace) -> list[dict]:
    contestants: dict[str, Callable[..., Iterator[int]]] = {
        "torchvision": theirs,
        "loader pillow": partial(loader, "pillow"),
        "loader dali": partial(loader, "dali"),
        "DALI parts": parts,
        "DALI crops": crops,
    }
    cpus = sorted(os.sched_getaffinity(0))
    cases = [(name, threads) for threads in args.threads for name in contestants]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for name, threads in cases:
            os.sched_setaffinity(0, cpus[:threads])
            workers = threads if threads > 1 or name.startswith("DALI") else 0
            batches = contestants[name](source, args.size, args.batch_size, workers)
            rates[name, threads].append(rate(batches, args.seconds))
    os.sched_setaffinity(0, cpus)
    rows = []
    for (name, threads), found in rates.items():
        median = statistics.median(found)
        row = {"what": name, "threads": threads, "images_per_second": median, "least": min(found), "most": max(found)}
        rows.append({**row, "against_torchvision": median / statistics.median(rates["torchvision", threads])})
    return rows


def agreement(source: Folder, size: int) -> dict[str, float]:
    """Mean absolute difference in gray levels of DALI's pipeline from Pillow and ops.crop_resize: of all, the worst."""
    files = InMemory(source, len(source))
    found: dict[str, float] = {}
    for filter in ("bicubic", "bilinear"):
        data, boxes, flip, _ = files.batch()
        ours = np.empty((len(data), 3, size, size), np.uint8)
        crop_rows([decode(file) for file in data], boxes, flip, filter, ours)
        img = DaliCrops(size, len(data), filter).run(data, boxes, flip).img.numpy()
        error = np.abs(ours.astype(np.int16) - img).mean((1, 2, 3))
        found |= {f"{filter}, mean": float(error.mean()), f"{filter}, worst image": float(error.max())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of images")
    parser.add_argument("--only", help="WIDTHxHEIGHT of the images to take")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as chosen:
        for path in sorted(args.data.rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg"):
                header = look(path.read_bytes())
                if args.only in (None, f"{header.width}x{header.height}"):
                    (Path(chosen) / path.name).symlink_to(path.resolve())
        source = Folder(chosen)
        rows, apart = measure(source, args), agreement(source, args.size)
    print(f"{len(source)} images, crops of {args.size}, batches of {args.batch_size}")
    print(f"{'what':<14} {'threads':>7} {'img/s':>9} {'least':>9} {'most':>9}  against torchvision")
    for row in rows:
        numbers = " ".join(f"{row[key]:9.1f}" for key in ("images_per_second", "least", "most"))
        print(f"{row['what']:<14} {row['threads']:>7} {numbers}  {row['against_torchvision']:.2f}x")
    for name, error in apart.items():
        print(f"DALI crops against the loader's, {name}: {error:.4f} gray levels")
    if args.json:
        record = {"images": len(source), "torch": torch.__version__, "results": rows, "agreement": apart}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
