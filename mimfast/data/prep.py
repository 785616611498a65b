"""Rewrite the images of a source once, at training size, into a store: decode, resize, encode, in threads.

Threads because Pillow works outside the interpreter lock: on two cores they are as fast as processes, within what
repeats differ by, and no pixels are copied from process to process (bench/data/bench_prep.py measures both).
"""

import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, features
from PIL import __version__ as pillow_version

from mimfast._check import UserError, fail
from mimfast.data.cpu import default_workers
from mimfast.data.crc32c import crc32c
from mimfast.data.decode import BadImage, decode_image
from mimfast.data.paths import STORE_INDEX, STORE_JOURNAL
from mimfast.data.sources import Source, pixels_at
from mimfast.data.store import FORMAT, VERSION, Store, read_index
from mimfast.data.store_writer import Record, Writer

_CHUNK = 16  # images a thread takes at a time
_REDUCING_GAP = 3.0  # as in crop.py
_DRAFT = 2  # a JPEG may be decoded at reduced size, to no less than this many times the size wanted
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class PrepConfig:
    """size: pixels of the short side (larger images are reduced to it, smaller ones left alone), or of the side when
    `square` (centre cut, smaller ones enlarged). format: of the records. quality: of JPEG, 1 to 100. filter: of the
    resizing, with antialias.
    """

    size: int = 256
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 90
    square: bool = False
    filter: Literal["bicubic", "lanczos", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 65500:
            fail("prep", "size", self.size, "1 to 65500", "it is a number of pixels and JPEG ends there")
        if self.format not in ("jpeg", "raw"):
            fail("prep", "format", repr(self.format), "'jpeg' or 'raw'", "a store has no other records")
        if not 1 <= self.quality <= 100:
            fail("prep", "quality", self.quality, "1 to 100", "JPEG has no other")
        if self.filter not in _FILTERS:
            fail("prep", "filter", repr(self.filter), " or ".join(map(repr, _FILTERS)), "images are resized with it")


class Summary(NamedTuple):
    """images, bad: kept and left out. bytes: of the data file. resumed: images of the source that were there before."""

    images: int
    bad: int
    bytes: int
    resumed: int
    seconds: float


def prep(
    source: Source,
    out: str | os.PathLike[str],
    config: PrepConfig | None = None,
    *,
    origin: str = "",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the store `out`; continue it when it was begun with the same images and settings; leave it when it is done.

    The result does not depend on the number of workers or on interruptions. Images that cannot be read are left out and
    listed with the reason in `bad.jsonl`. origin: what the header says about where the images are from. workers:
    threads, default one per usable CPU. progress: called with (images done, in all, bad ones so far).
    Raises UserError when `out` holds something else, cannot be written or the disk is full, or no image is readable.
    """
    config, out, began = config or PrepConfig(), Path(out), time.monotonic()
    if workers is not None and workers < 1:
        fail("prep", "workers", workers, "at least 1", "they do the work")
    if isinstance(source, Store) and out.exists() and os.path.samefile(source.path, out):
        raise UserError(f"prep: '{out}' is both source and store, expected another folder to write to")
    job = _job(source, config)
    done = _finished(out, job, began)
    if done is not None:
        return done
    with Writer(out, job) as writer:
        resumed = writer.done
        _run(source, config, writer, workers or default_workers(), progress)
        if not writer.images:
            i, reason = writer.bad[0]
            raise UserError(
                f"prep: the source has no readable image among {len(source)} (the first: '{source.name(i)}', "
                f"{reason}), expected at least one"
            )
        meta = writer.finish(source, _meta(source, job, origin))
    return Summary(meta["images"], meta["bad"], meta["data_bytes"], resumed, time.monotonic() - began)


def make_record(source: Source, i: int, config: PrepConfig) -> Record:
    """What the store keeps of image i of the source, or why it keeps nothing."""
    try:
        pixels = pixels_at(source, i)
        data = b"" if pixels is not None else source.read(i)
        image = Image.fromarray(pixels) if pixels is not None else decode_image(data, _DRAFT * config.size)
        image = _resized(image, config)
        if config.format == "raw":
            data = image.tobytes()
        elif not _is_as_wanted(data, image):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=config.quality)
            data = buffer.getvalue()
        return Record(i, data, image.height, image.width, crc32c(data))
    except BadImage as error:
        return Record(i, None, reason=error.reason)
    except OSError as error:
        return Record(i, None, reason=f"cannot be read: {error.strerror or error}")


def _resized(image: Image.Image, config: PrepConfig) -> Image.Image:
    width, height, size = image.width, image.height, config.size
    short = min(width, height)
    resampling = _FILTERS[config.filter]
    if config.square:
        left, top = (width - short) // 2, (height - short) // 2
        edges = (left, top, left + short, top + short)
        if short == size:
            return image.crop(edges)
        return image.resize((size, size), resampling, edges, _REDUCING_GAP)
    if short <= size:
        return image
    wanted = tuple(max(size, round(side * size / short)) for side in (width, height))
    if config.format == "jpeg" and max(wanted) > 65500:
        raise BadImage(f"{wanted[0]}x{wanted[1]} is more than JPEG can hold")
    return image.resize(wanted, resampling, reducing_gap=_REDUCING_GAP)  # type: ignore[arg-type]


def _is_as_wanted(data: bytes, image: Image.Image) -> bool:
    """Whether the file read is a JPEG of just this image: it is kept as it is, instead of losing quality once more."""
    if not data.startswith(b"\xff\xd8"):
        return False
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as stored:
        same = stored.format == "JPEG" and stored.size == image.size and stored.mode in ("RGB", "L")
        try:
            return same and stored.getexif().get(0x0112, 1) == 1
        except Exception:  # a damaged EXIF block, which decoding ignores too
            return False


def _run(source: Source, config: PrepConfig, writer: Writer, workers: int, progress: Progress | None) -> None:
    """Everything that is not yet there: chunks are done in any order and written in theirs."""
    count = len(source)

    def chunk(first: int) -> list[Record]:
        return [make_record(source, i, config) for i in range(first, min(first + _CHUNK, count))]

    ahead: deque[Future[list[Record]]] = deque()
    firsts = iter(range(writer.done, count, _CHUNK))
    pool = ThreadPoolExecutor(workers, "mimfast-prep")
    try:
        ahead.extend(pool.submit(chunk, first) for first in islice(firsts, 2 * workers))
        while ahead:
            writer.append(ahead.popleft().result())
            ahead.extend(pool.submit(chunk, first) for first in islice(firsts, 1))
            if progress is not None:
                progress(writer.done, count, len(writer.bad))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _job(source: Source, config: PrepConfig) -> dict[str, Any]:
    """What decides the bytes of the store. digest: of the names and labels, so that a changed source is noticed."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(len(source)):
        digest.update(f"{source.name(i)}\0{source.label(i)}\n".encode("utf-8", "surrogateescape"))
    job = {**asdict(config), "version": VERSION, "count": len(source), "digest": digest.hexdigest()}
    if config.format == "raw":
        del job["quality"]
    return job


def _meta(source: Source, job: dict[str, Any], origin: str) -> dict[str, Any]:
    """The header of the store, as far as it is known before the images are."""
    kept = {key: job.get(key) for key in ("size", "square", "filter", "quality", "digest")}
    return {
        "format": FORMAT,
        "version": VERSION,
        "records": job["format"],
        **kept,
        "colour": "RGB as the files have it, no colour profile applied",
        "source": origin,
        "source_images": job["count"],
        "classes": None if source.classes is None else list(source.classes),
        "held_out": list(getattr(source, "held_out", ())),
        "software": f"Pillow {pillow_version}, libjpeg {features.version('jpg')}",
    }


def _finished(out: Path, job: dict[str, Any], began: float) -> Summary | None:
    """The summary of a store that is already there; None when there is none."""
    if not (out / STORE_INDEX).is_file():
        return None
    meta, _ = read_index(out)
    there = {
        **{key: meta.get(key) for key in ("size", "square", "filter", "quality", "version", "digest")},
        "format": meta["records"],
        "count": meta["source_images"],
    }
    for key, value in job.items():
        if there[key] != value:
            what = "the images differ" if key in ("digest", "count") else f"its {key} is {there[key]!r}, not {value!r}"
            raise UserError(
                f"prep: '{out}' is a store already, of something else ({what}), expected a new or empty folder"
            )
    (out / STORE_JOURNAL).unlink(missing_ok=True)  # when killed between the last two steps
    return Summary(meta["images"], meta["bad"], meta["data_bytes"], meta["source_images"], time.monotonic() - began)
