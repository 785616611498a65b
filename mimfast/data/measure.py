"""`mimfast bench data DIR`: what a source gives, decoder by decoder, and what a store of `mimfast prep` would give.

All contestants take turns, round after round; printed is the median of the rounds. Each one goes on in the order of
samples where the one before it stopped, so that nobody finds the files another has just brought into memory, until the
images have been through once. The loader's cache of decoded images is off in all but the ceiling.
"""

import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from mimfast import __version__
from mimfast._check import UserError, fail
from mimfast.data.cpu import default_workers, usable_cpus
from mimfast.data.decoders import DECODERS, open_decoder
from mimfast.data.loader import Loader
from mimfast.data.order import sample_at
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Source, Subset, open_source, pixels_at
from mimfast.data.store import Store

STAGES = ("read", "decode", "crop")
_SAMPLE = 256  # images of the small stores that say what mimfast prep would bring
_STORE_SIDE = 256  # of `mimfast prep`, while crops are smaller
_PIXELS = "pixels"  # what a contestant is called that needs no decoder


@dataclass(frozen=True)
class Settings:
    """size: side of the crops in pixels. batch_size: images. seconds: of one measurement, at least. workers: threads
    of the second column. rounds: measurements of each contestant."""

    size: int = 224
    batch_size: int = 64
    seconds: float = 3.0
    workers: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "workers", "rounds"):
            if getattr(self, name) < 1:
                fail("bench data", name, getattr(self, name), "at least 1", "nothing can be measured with less")
        if not self.seconds > 0:
            fail("bench data", "seconds", self.seconds, "more than 0", "it is how long a measurement takes")


class Leg(NamedTuple):
    """One measurement. busy: seconds of each stage, summed over threads. cores: CPU time of the process divided by
    seconds. position: of the loader at the end."""

    images: int
    seconds: float
    busy: dict[str, float]
    cores: float
    position: int


@dataclass
class Contestant:
    """A source through a decoder. legs: number of workers -> its measurements."""

    name: str
    source: Source
    decoder: str
    record_bytes: float | None = None
    legs: dict[int, list[Leg]] = field(default_factory=dict)

    def rates(self, workers: int) -> list[float]:
        """Images per second, ascending."""
        return sorted(leg.images / leg.seconds for leg in self.legs[workers])

    def rate(self, workers: int) -> float:
        return statistics.median(self.rates(workers))

    def shares(self, workers: int) -> dict[str, float]:
        """What the threads spend their time on: reading, decoding, cropping, and the rest, which is the loader's own.
        The shares are those of all rounds together; threads that wait for a core count as busy."""
        legs = self.legs[workers]
        whole = workers * sum(leg.seconds for leg in legs)
        found = {stage: sum(leg.busy[stage] for leg in legs) / whole for stage in STAGES}
        return {**found, "loader": max(0.0, 1 - sum(found.values()))}

    def record(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {
                "workers": workers,
                "images_per_second": self.rate(workers),
                "least": self.rates(workers)[0],
                "most": self.rates(workers)[-1],
                "cores": statistics.median(leg.cores for leg in legs),
                "images_per_cpu_second": sum(leg.images for leg in legs) / sum(leg.cores * leg.seconds for leg in legs),
                "shares": self.shares(workers),
            }
            for workers, legs in self.legs.items()
        ]
        return {"what": self.name, "decoder": self.decoder, "record_bytes": self.record_bytes, "results": rows}


@dataclass
class Found:
    """All that was measured. missing: decoder -> why it could not run. used: the decoder of a run, and of the ceiling,
    which is images per second of each round."""

    origin: str
    images: int
    settings: Settings
    contestants: list[Contestant]
    stores: list[Contestant]
    missing: dict[str, str]
    used: str
    ceiling: list[float]


def measure(source: Source, origin: str, settings: Settings, decoders: list[str], with_prep: bool = True) -> Found:
    """Measure a source.

    decoders: names of `decoders.DECODERS`; empty: all. with_prep: write a few hundred images into small stores, in a
    temporary folder, and measure those too. Raises UserError when no image can be read or no decoder named is there.
    """
    contestants, missing = contestants_of(source, settings, decoders)
    if not contestants:
        raise UserError(next(iter(missing.values())))
    decoder = decoders[0] if len(decoders) == 1 else "auto"
    with tempfile.TemporaryDirectory(prefix="mimfast-bench-") as folder:
        stores = []
        if with_prep and contestants[0].name != _PIXELS:
            stores = _stores(source, origin, settings, Path(folder))
        counts = sorted({1, settings.workers})
        race([*contestants, *stores], settings, counts)
    ceiling = _ceiling(source, settings, decoder)
    used = open_decoder("auto").name if decoder == "auto" else decoder
    return Found(origin, len(source), settings, contestants, stores, missing, used, ceiling)


def contestants_of(source: Source, settings: Settings, decoders: list[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Those that run here, and why the others do not."""
    for name in decoders:
        if name not in DECODERS:
            fail("bench data", "decoder", repr(name), " or ".join(map(repr, DECODERS)), "no other decoder is known")
    if _keeps_pixels(source):
        return [Contestant(_PIXELS, source, "auto")], {}
    found, missing = [], {}
    for name in decoders or [name for name in DECODERS if name != "auto"]:
        try:
            Loader(source, settings.size, settings.batch_size, seed=0, decoder=name).close()
            found.append(Contestant(name, source, name))
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def race(contestants: list[Contestant], settings: Settings, counts: list[int]) -> None:
    """Let the contestants take turns, with each number of workers, and write down their legs."""
    position: dict[int, int] = {}
    for _ in range(settings.rounds):
        for contestant in contestants:
            for workers in counts:
                key = id(contestant.source)
                leg = _leg(contestant, settings, workers, position.get(key, 0))
                position[key] = leg.position
                contestant.legs.setdefault(workers, []).append(leg)


def _leg(contestant: Contestant, settings: Settings, workers: int, start: int) -> Leg:
    with Loader(
        contestant.source, settings.size, settings.batch_size, seed=0, start=start, workers=workers,
        decoder=contestant.decoder, cache_bytes=0,
    ) as loader:  # fmt: skip
        next(loader)  # what the threads have begun by now makes up for what they leave half done at the end
        before, cpu, began = loader.clock.snapshot(), time.process_time(), time.perf_counter()
        images, elapsed = 0, 0.0
        while elapsed < settings.seconds:
            images += len(next(loader).img)
            elapsed = time.perf_counter() - began
        after, cores = loader.clock.snapshot(), (time.process_time() - cpu) / elapsed
        busy = {stage: after[stage][0] - before[stage][0] for stage in STAGES}
        return Leg(images, elapsed, busy, cores, loader.position)


def _ceiling(source: Source, settings: Settings, decoder: str) -> list[float]:
    """Images per second of the loader as a run has it, with nothing to do for the crops, once its cache is warm."""
    rates = []
    with Loader(
        source, settings.size, settings.batch_size, seed=0, workers=settings.workers, decoder=decoder,
        pin=torch.cuda.is_available(),
    ) as loader:  # fmt: skip
        began, images = time.perf_counter(), 0
        while images < min(len(source), settings.batch_size) or (
            images < len(source) and time.perf_counter() - began < settings.seconds
        ):
            images += len(next(loader).img)
        for _ in range(settings.rounds):
            began, images, elapsed = time.perf_counter(), 0, 0.0
            while elapsed < settings.seconds:
                images += len(next(loader).img)
                elapsed = time.perf_counter() - began
            rates.append(images / elapsed)
    return rates


def _keeps_pixels(source: Source) -> bool:
    for i in range(min(len(source), 16)):
        try:
            return pixels_at(source, i) is not None
        except OSError:
            continue
    return False


def _stores(source: Source, origin: str, settings: Settings, folder: Path) -> list[Contestant]:
    """A few images of the source as a store of JPEG records and one of pixels."""
    side = _STORE_SIDE if settings.size <= _STORE_SIDE else settings.size
    ids = np.unique(sample_at(np.arange(min(_SAMPLE, len(source))), len(source), 0)[1])
    found = []
    for kind in ("jpeg", "raw"):
        done = prep(Subset(source, ids), folder / kind, PrepConfig(side, kind), origin=origin)
        name = f"{kind} store, {side} px"
        found.append(Contestant(name, Store(folder / kind), "auto", done.bytes / done.images))
    return found


def table(found: Found) -> str:
    """What was measured, as plain text. The shares are those of one worker, where no thread waits for another."""
    settings, many = found.settings, found.settings.workers
    head = [
        "",
        "img/s, 1 worker",
        *[f"img/s, {many} workers"] * (many > 1),
        "read",
        "decode",
        "crop",
        "loader",
        "cores",
    ]
    rows = [head]
    for contestant in [*found.contestants, *found.stores]:
        shares, cores = contestant.shares(1), statistics.median(leg.cores for leg in contestant.legs[many])
        rates = [f"{contestant.rate(workers):.1f}" for workers in contestant.legs]
        rows.append([contestant.name, *rates, *(f"{100 * share:.1f} %" for share in shares.values()), f"{cores:.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{found.origin}: {found.images} images, crops of {settings.size} px, batches of {settings.batch_size}, "
        f"{usable_cpus():g} usable CPUs",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows),
    ]
    lines += [f"{name}: {reason}" for name, reason in found.missing.items()]
    return "\n".join([*lines, *sentences(found)])


def sentences(found: Found) -> list[str]:
    """The ceiling, the loader's own share, and what to do; nothing is advised that was not measured."""
    many = found.settings.workers
    best = max(found.contestants, key=lambda contestant: contestant.rate(many))
    own = best.shares(1)["loader"]
    through = "" if best.name == _PIXELS else f", decoder {found.used}"
    told = [
        f"ceiling: {statistics.median(found.ceiling):.1f} images/s as a run loads them ({_threads(many)}{through}, "
        f"cache of decoded images warm), with nobody to train on them",
        f"the loader's own share: {100 * own:.1f} % of a worker's time; the rest is {_spent(best)}",
    ]
    return [*told, *_on_decoders(found, best), *_on_stores(found, best)]


def _threads(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _spent(contestant: Contestant) -> str:
    shares = contestant.shares(1)
    words = {"read": "reading", "decode": "decoding", "crop": "cropping"}
    order = sorted(STAGES, key=lambda stage: -shares[stage])
    return ", ".join(f"{words[stage]} {100 * shares[stage]:.0f} %" for stage in order if shares[stage] >= 0.005)


def _on_decoders(found: Found, best: Contestant) -> list[str]:
    if best.name == _PIXELS:
        return ["decoder: none is needed, the source keeps pixels"]
    if len(found.contestants) == 1:
        return [f"decoder: {best.name} is the only one measured"]
    many = found.settings.workers
    rest = [contestant for contestant in found.contestants if contestant is not best]
    second = max(rest, key=lambda contestant: contestant.rate(many))
    if not _clearly(best, second, many):
        return [f"decoder: {best.name} and {second.name} are equally fast here, within what the rounds differ by"]
    ratio = best.rate(many) / second.rate(many)
    choice = "what a run takes by itself" if best.name == found.used else f"--data.decoder {best.name}"
    return [f"decoder: {best.name} is the fastest, {ratio:.2f}x {second.name}: {choice}"]


def _on_stores(found: Found, best: Contestant) -> list[str]:
    many, told = found.settings.workers, []
    for store in found.stores:
        kind = store.name.split()[0]
        size = f"{(store.record_bytes or 0) / 1e3:.0f} kB an image"
        ratio = store.rate(many) / best.rate(many)
        if _clearly(store, best, many):
            side = store.name.split()[-2]
            told.append(
                f"a {kind} store would load {ratio:.1f}x as fast ({store.rate(many):.0f} against {best.rate(many):.0f} "
                f"images/s; {size}): mimfast prep {found.origin} OUT --format {kind} --size {side}"
            )
        else:
            told.append(f"a {kind} store is not clearly faster here: {ratio:.2f}x ({size})")
    if found.stores:
        told.append(
            f"stores were measured on {len(found.stores[0].source)} images in memory; a run gains from them what its "
            "data-wait is, and no more"
        )
    return told


def _clearly(faster: Contestant, slower: Contestant, workers: int) -> bool:
    """Every round of the one was faster than every round of the other."""
    return faster.rates(workers)[0] > slower.rates(workers)[-1]


def record(found: Found) -> dict[str, Any]:
    """What --json writes."""
    return {
        "data": found.origin,
        "images": found.images,
        "settings": asdict(found.settings),
        "contestants": [contestant.record() for contestant in [*found.contestants, *found.stores]],
        "missing": found.missing,
        "ceiling": {"decoder": found.used, "images_per_second": found.ceiling},
        "cpus": usable_cpus(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"mimfast": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def main(rest: list[str]) -> int:
    """The words after `mimfast bench data`; returns the exit code."""
    import tyro

    def command(
        data: Annotated[str, tyro.conf.Positional],
        size: int = 224,
        batch_size: int = 64,
        seconds: float = 3.0,
        workers: int = 0,
        decoder: tuple[str, ...] = (),
        rounds: int = 3,
        prep: bool = True,
        json: Path | None = None,
    ) -> None:
        """How many images a second come out of DIR, decoder by decoder, and what limits it.

        Args:
            data: What --data of pretrain takes: a folder of images, tar shards, a store, "photos" or "digits".
            size: Side of the crops in pixels.
            batch_size: Images of a batch.
            seconds: Length of one measurement; there are two for each decoder and store in each round.
            workers: Threads beside the measurement with one; 0 is one per usable CPU.
            decoder: Only these decoders; all that are installed otherwise.
            rounds: Measurements of each; the median counts.
            prep: Write a few hundred images into small stores in a temporary folder and measure those too.
            json: Write everything that was measured here.
        """
        settings = Settings(size, batch_size, seconds, workers or default_workers(), rounds)
        found = measure(open_source(data), data, settings, list(decoder), prep)
        print(table(found))
        if json is not None:
            _write(json, found)

    tyro.cli(command, args=rest, prog="mimfast bench data")
    return 0


def _write(path: Path, found: Found) -> None:
    try:
        path.write_text(json.dumps(record(found), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"bench data: --json has '{path}', expected a file that can be written ({error.strerror})"
        ) from None
