"""Random crops a second on one core, by source and decoder, against what users have today.

    python bench/data/bench_throughput.py [--data DIR] [--size 224] [--rounds 7] [--seconds 1] [--json FILE]

The peer is torch's DataLoader in its own process (no workers) with Pillow and torchvision's RandomResizedCrop (bicubic,
antialias, scale 0.2 to 1, flip) on the same photographs. Everything else is mimfast's loader, with its cache of decoded
images off: the photographs as they are, a store of JPEGs and a store of pixels that `mimfast prep` made of them (short
side 256, quality 90), with each decoder that is installed, DALI on the CPU among them. "alone" is one loop of reading,
decoding and cropping image by image with nothing around it, boxes known beforehand: what a loader costs beyond it is
its overhead.

All of them exist throughout and take turns within one process, each for `seconds` a round, torch and all decoders on
one thread. The ratio of a round is formed within that round; printed are medians, and the least and the most.
Without --data the photographs are made: windows of those of the demo extra, 500 x 375 pixels, JPEG of quality 95, which
makes them about as large as those of ImageNet. Before any race each decoder is held against Pillow on all of them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import PIL
import torch
from bench_loader import theirs
from PIL import Image, features

from mimfast.data.crop import CropConfig, crop_boxes, crop_rows, crop_words, min_decoded_side
from mimfast.data.decode import decode
from mimfast.data.decoders import DECODERS, open_decoder, why_not
from mimfast.data.embedded import photos
from mimfast.data.loader import Loader
from mimfast.data.order import sample_at
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder, Source, pixels_at
from mimfast.data.store import Store
from mimfast.testing.record import write_record

PEER, BATCH, LEVELS = "DataLoader + Pillow + torchvision", 64, 0.5


def make_photographs(folder: Path, each: int = 16) -> None:
    """Windows of half to all of every photograph of the demo extra."""
    source, rng = photos(), np.random.default_rng(0)
    for i in range(len(source)):
        image = Image.fromarray(decode(source.read(i)))
        for k in range(each):
            width = min(image.width, image.height * 4 / 3) * rng.uniform(0.5, 1) ** 0.5
            left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - width * 3 / 4)
            box = (left, top, left + width, top + width * 3 / 4)
            image.resize((500, 375), Image.Resampling.BICUBIC, box).save(folder / f"{i:02d}_{k:02d}.jpg", quality=95)


def largest_difference(source: Source, decoder: str) -> float:
    """The largest mean difference of an image from Pillow's, in levels."""
    pixels, files = open_decoder(decoder).pixels, (source.read(i) for i in range(len(source)))
    return max(float(np.abs(pixels(file, None).astype(int) - decode(file)).mean()) for file in files)


def ours(source: Source, decoder: str, size: int, clocks: dict[str, Any], name: str) -> Iterator[int]:
    with Loader(source, size, BATCH, seed=0, cache_bytes=0, decoder=decoder) as loader:
        clocks[name] = loader.clock
        for batch in loader:
            yield len(batch.img)


def alone(source: Source, decoder: str, size: int) -> Iterator[int]:
    """Read, decode, crop, one image after the other, in the order and with the boxes of the loader."""
    config, pixels = CropConfig(), open_decoder(decoder).pixels
    epochs, ids = sample_at(np.arange(16 * BATCH), len(source), 0)
    shapes = [_pixels(source, pixels, i, None).shape for i in range(len(source))]
    heights, widths = np.array([shapes[i][:2] for i in ids]).T
    boxes, flips = crop_boxes(crop_words(0, epochs, ids), widths, heights, config)
    min_side = min_decoded_side(size, config)
    while True:
        for first in range(0, len(ids), BATCH):
            out = np.empty((BATCH, 3, size, size), np.uint8)
            for row, at in enumerate(range(first, first + BATCH)):
                image = _pixels(source, pixels, int(ids[at]), min_side)
                crop_rows([image], boxes[at : at + 1], flips[at : at + 1], config.filter, out[row : row + 1])
            yield BATCH


def _pixels(source: Source, decode: Any, i: int, min_side: int | None) -> np.ndarray:
    image = pixels_at(source, i)
    return decode(source.read(i), min_side) if image is None else image


def rate(batches: Iterator[int], seconds: float) -> float:
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += next(batches)
    return images / (time.perf_counter() - began)


def race(contestants: dict[str, Iterator[int]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of each, round by round, after two batches of warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for batches in contestants.values():
        next(batches), next(batches)
    for _ in range(rounds):
        for name, batches in contestants.items():
            rates[name].append(rate(batches, seconds))
    return rates


def report(rates: dict[str, list[float]], clocks: dict[str, Any]) -> list[dict[str, Any]]:
    print(
        f"{'images a second, one core':44s}{'median':>8s}{'least':>8s}{'most':>8s}{'x peer':>8s}{'over alone':>12s}"
        "  us an image: read, decode, crop"
    )
    rows = []
    for name, found in rates.items():
        row: dict[str, Any] = {"contestant": name, "images_per_s": statistics.median(found)}
        row |= {"least": min(found), "most": max(found)}
        row["times_peer"] = statistics.median(mine / peer for mine, peer in zip(found, rates[PEER]))
        line = f"{name:44s}{row['images_per_s']:8.0f}{row['least']:8.0f}{row['most']:8.0f}{row['times_peer']:8.2f}"
        bare = rates.get(f"{name}, alone")
        if bare is not None:
            row["overhead"] = statistics.median(one / mine - 1 for mine, one in zip(found, bare))
            stages = {stage: (s, n) for stage, (s, n) in clocks[name].snapshot().items() if n and stage != "wait"}
            row["us_per_image"] = {stage: 1e6 * seconds / images for stage, (seconds, images) in stages.items()}
            line += f"{100 * row['overhead']:+11.1f}%  " + ", ".join(f"{us:.0f}" for us in row["us_per_image"].values())
        print(line)
        rows.append(row)
    return rows


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    source = Folder(args.data or folder)
    sources: dict[str, Source] = {"folder": source}
    for kind in ("jpeg", "raw"):
        prep(source, folder / f"{kind}-store", PrepConfig(256, kind))  # type: ignore[arg-type]
        sources[f"{kind} store"] = Store(folder / f"{kind}-store")
    decoders = [name for name in DECODERS if name not in ("auto", "dali") and why_not(name) is None]
    apart = {name: max(largest_difference(sources[s], name) for s in ("folder", "jpeg store")) for name in decoders}
    wrong = [name for name in decoders if apart[name] > LEVELS]
    for name in wrong:
        print(f"no speed of {name}: an image is {apart[name]:.2f} levels from Pillow's on average")
    clocks: dict[str, Any] = {}
    contestants = {PEER: theirs(source, args.size, BATCH, 0)}
    for of, images in sources.items():
        for decoder in ["pillow"] if of == "raw store" else [name for name in decoders if name not in wrong]:
            name = of if of == "raw store" else f"{of}, {decoder}"
            contestants[name] = ours(images, decoder, args.size, clocks, name)
            contestants[f"{name}, alone"] = alone(images, decoder, args.size)
        if of != "raw store" and why_not("dali") is None:
            contestants[f"{of}, dali"] = ours(images, "dali", args.size, clocks, f"{of}, dali")
    image, bytes_each = decode(source.read(0)), np.mean([len(source.read(i)) for i in range(len(source))])
    print(f"{len(source)} photographs, the first {image.shape[1]} x {image.shape[0]}, {bytes_each / 1e3:.0f} kB each")
    rows = report(race(contestants, args.rounds, args.seconds), clocks)
    return {
        "images": len(source), "bytes_per_image": float(bytes_each), "size": args.size, "batch": BATCH,
        "rounds": args.rounds, "seconds": args.seconds, "auto": open_decoder("auto").name, "levels_from_pillow": apart,
        "pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo"), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of photographs; without it they are made")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_photographs(Path(folder))
        record = run(Path(folder), args)
    if args.json:
        write_record(args.json, {"what": "throughput of loaders", **record})


if __name__ == "__main__":
    main()
