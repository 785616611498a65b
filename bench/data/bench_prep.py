"""What `mimfast prep` costs and what its stores give, images per second.

    python bench/data/bench_prep.py --data SRC [--size 256] [--crop 224] [--workers 1 2] [--json FILE]

SRC is anything `--data` takes. The contestants of a table take turns within one process; printed is the median of the
rounds with the extremes. Tables: making a store with threads, and by the same code in processes; reading records in
random order from the page cache; the loader's crops from originals and from stores; checksums.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch

from mimfast import _native
from mimfast.data.cpu import usable_cpus
from mimfast.data.crc32c import by_numpy, crc32c
from mimfast.data.decode import decode
from mimfast.data.loader import Loader
from mimfast.data.prep import _CHUNK, PrepConfig, _job, _meta, make_record, prep
from mimfast.data.sources import Source, open_source
from mimfast.data.store import Store
from mimfast.data.store_writer import Writer
from mimfast.data.verify import verify

Row = dict[str, object]
_chunk_source: Source | None = None


def race(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """{name: rates}; the calls take turns."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(call())
    return rates


def table(title: str, unit: str, rates: dict[str, list[float]]) -> list[Row]:
    print(f"\n{title}\n{'':<34} {unit:>10} {'least':>10} {'most':>10}")
    rows = []
    for name, found in rates.items():
        row = {"what": name, "median": statistics.median(found), "least": min(found), "most": max(found)}
        print(f"{name:<34} " + " ".join(f"{row[key]:>10.1f}" for key in ("median", "least", "most")))
        rows.append(row)
    return rows


def timed(count: float, call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return count / (time.perf_counter() - began)


def _open_in_process(spec: str) -> None:
    global _chunk_source
    _chunk_source = open_source(spec)


def _chunk(first: int, last: int, config: PrepConfig) -> list:
    assert _chunk_source is not None
    return [make_record(_chunk_source, i, config) for i in range(first, last)]


def making(spec: str, source: Source, config: PrepConfig, workers: list[int], folder: Path) -> dict:
    """Stores made with 1, 2, ... threads, and with as many processes."""
    numbers = itertools.count()

    def by_threads(count: int) -> float:
        return timed(len(source), lambda: prep(source, folder / f"{next(numbers)}", config, workers=count))

    def by_processes(count: int) -> float:
        firsts = range(0, len(source), _CHUNK)
        lasts = [min(first + _CHUNK, len(source)) for first in firsts]

        def make() -> None:
            job = _job(source, config)
            with Writer(folder / f"{next(numbers)}", job) as writer:
                for records in pool.map(_chunk, firsts, lasts, [config] * len(lasts)):
                    writer.append(records)
                writer.finish(source, _meta(source, job, spec))

        with ProcessPoolExecutor(count, initializer=_open_in_process, initargs=(spec,)) as pool:
            list(pool.map(_chunk, [0] * count, [1] * count, [config] * count))  # started before the clock
            return timed(len(source), make)

    calls: dict[str, Callable[[], float]] = {}
    for count in workers:
        calls[f"{config.format}, {count} threads"] = lambda count=count: by_threads(count)  # type: ignore[misc]
        if count > 1:
            calls[f"{config.format}, {count} processes"] = lambda count=count: by_processes(count)  # type: ignore[misc]
    return calls


def reading(stores: dict[str, Store], seconds: float) -> dict[str, Callable[[], float]]:
    """Records in random order, warm; a raw record's bytes are all touched."""

    def rate(store: Store, use: Callable[[int], object]) -> float:
        order = np.random.default_rng(0).permutation(len(store)).tolist()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for i in order:
                use(i)
            done += len(order)
        return done / (time.perf_counter() - began)

    raw, jpeg = stores["raw"], stores["jpeg"]
    into = np.empty(int(raw.sizes.max()), np.uint8)
    return {
        "raw: pixels (a view, not touched)": lambda: rate(raw, raw.pixels),
        "raw: pixels, copied": lambda: rate(raw, lambda i: np.copyto(into[: raw.sizes[i]], raw.record(i))),
        "raw: read (a PPM file)": lambda: rate(raw, raw.read),
        "jpeg: read": lambda: rate(jpeg, jpeg.read),
        "jpeg: decoded": lambda: rate(jpeg, lambda i: decode(jpeg.read(i))),
    }


def loading(sources: dict[str, Source], size: int, seconds: float) -> dict[str, Callable[[], float]]:
    def rate(source: Source) -> float:
        with Loader(source, size, 64, seed=0, workers=0, cache_bytes=0) as loader:
            next(loader)
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                done += len(next(loader).img)
            return done / (time.perf_counter() - began)

    return {f"loader, from {name}": lambda source=source: rate(source) for name, source in sources.items()}  # type: ignore[misc]


def checking(stores: dict[str, Store]) -> dict[str, Callable[[], float]]:
    """GB/s."""
    data = np.random.default_rng(0).integers(0, 256, 256 * 256 * 3, np.uint8)
    times = 200
    calls: dict[str, Callable[[], float]] = {}

    def checksum(call: Callable[[np.ndarray], object], times: int) -> float:
        return timed(times * data.size / 1e9, lambda: [call(data) for _ in range(times)])

    core = _native.core()
    if core is not None:
        calls["CRC-32C, instruction"] = lambda: checksum(crc32c, times)
        calls["CRC-32C, tables"] = lambda: checksum(
            lambda d: core.crc32c_cpu(d.ctypes.data, d.size, portable=True), times
        )
    calls["CRC-32C, numpy"] = lambda: checksum(by_numpy, 5)
    calls["zlib.crc32"] = lambda: checksum(zlib.crc32, times)
    for name, store in stores.items():
        size = store.meta["data_bytes"] / 1e9
        calls[f"verify, {name} store"] = lambda store=store, size=size: timed(size, lambda: verify(store.path))  # type: ignore[misc]
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images, as --data of mimfast pretrain")
    parser.add_argument("--size", type=int, default=256, help="short side of the stores")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(args.data)
    print(f"{len(source)} images, stores of {args.size}, {usable_cpus():g} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        calls: dict[str, Callable[[], float]] = {}
        for kind in ("jpeg", "raw"):
            config = PrepConfig(args.size, kind)  # type: ignore[arg-type]
            done = prep(source, Path(folder) / kind, config)
            stores[kind] = Store(Path(folder) / kind)
            print(f"{kind} store: {done.bytes / 1e6:.1f} MB, {done.bytes / done.images / 1e3:.1f} kB an image")
            calls |= making(args.data, source, config, args.workers, Path(folder) / f"{kind}-made")
        sources: dict[str, Source] = {"originals": source, **{f"{name} store": s for name, s in stores.items()}}
        results = {
            "prep": table("prep", "images/s", race(calls, args.rounds)),
            "read": table("reading, one thread", "images/s", race(reading(stores, args.seconds), args.rounds)),
            "loader": table(
                f"random crops of {args.crop}, one thread, Pillow",
                "images/s",
                race(loading(sources, args.crop, args.seconds), args.rounds),
            ),
            "checksums": table("checksums", "GB/s", race(checking(stores), args.rounds)),
        }
    if args.json:
        record = {
            "images": len(source),
            "size": args.size,
            "crop": args.crop,
            "cpus": usable_cpus(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
