"""Endless batches of random crops, decoded by threads (codecs release the interpreter lock while they work).

What a batch holds is a pure function of (source, seed, first sample, size): the number of workers, the prefetch depth,
the cache and the number of processes that share the work change only the speed. Resuming is
`start=<samples already used>`.
B samples of a batch, S side of the crop in pixels.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimfast import philox
from mimfast._check import UserError, fail
from mimfast.data.bad import BadImages
from mimfast.data.clock import StageClock, Tally
from mimfast.data.crop import CropConfig, centre_box, crop_rows, crop_words, min_decoded_side
from mimfast.data.decoders import open_decoder, why_not
from mimfast.data.fill import Batch, Filler, Reader, Work
from mimfast.data.fill_dali import DaliFiller
from mimfast.data.fill_dali_crops import DaliCropFiller
from mimfast.data.order import sample_at
from mimfast.data.resident import Resident
from mimfast.data.sources import Source

_CACHE_BYTES = 256 << 20
_MAE_CROP = CropConfig()
_PLANNED = 2048  # samples whose places and random words are worked out together


class Change(NamedTuple):
    """From sample number `at` of the order on, crops have `size` px and batches `batch_size` samples of one process."""

    at: int
    size: int
    batch_size: int


class Loader:
    """Iterates forever over `Batch`es; a context manager; `close()` ends its threads.

    source: where the images come from. size: side S of the crop in pixels. batch_size: samples of one batch of this
    process; the global batch has batch_size * world samples, of which this process takes its `rank`-th run of rows.
    seed: of order and crops. start: samples already used, by all processes. workers: decoding threads, 0 decodes in the
    caller. crop: the random crop. prefetch: batches prepared ahead. cache_bytes: memory for decoded images.
    changes: other sizes to come, ascending by `at`; one takes effect with the first batch that begins at or after it,
    so that no sample is lost or repeated, and those before `start` have taken effect already. decoder: a name of
    `decoders.DECODERS`; "dali" gives the batches of "pillow"; sources that keep pixels need none; "dali_gpu" makes
    batches on `device`, a CUDA device, for the current stream, with nearly the pixels of the others. repeat: views of
    each image, neighbours in the order, with a crop of its own each; the image is decoded once for them.
    pin: batches in page-locked memory, for a GPU.
    resident: keeps what has been decoded for later epochs, see `resident.Resident`; when that is on a GPU, batches come
    from there, made on the current stream. It stays its owner's.

    An image that cannot be read is put on `bad` and replaced by another one, so that the batch size is constant: the
    replacement depends on (seed, epoch, sample id) only, and `sample_ids` names the image really used.

    Raises UserError for arguments out of range, and from the iteration when no image can be read.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        workers: int = 0,
        crop: CropConfig = _MAE_CROP,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        cache_bytes: int = _CACHE_BYTES,
        changes: Sequence[Change] = (),
        decoder: str = "auto",
        repeat: int = 1,
        pin: bool = False,
        resident: Resident | None = None,
        device: torch.device | str = "cuda",
        _dali_on_cpu: bool = False,
    ) -> None:
        _check_arguments(source, size, batch_size, start, workers, rank, world, prefetch, repeat)
        _check_changes(changes)
        philox.check_seed("loader", seed)
        self.source, self.size, self.batch_size, self.seed = source, size, batch_size, seed
        self.rank, self.world, self.workers, self.crop = rank, world, workers, crop
        self.repeat, self.clock = repeat, StageClock()
        self._pin, self._resident = pin, resident
        self._decoder = open_decoder("pillow" if decoder in ("dali", "dali_gpu") else decoder)
        self._cache_bytes = 0 if resident is not None and resident.device is not None else cache_bytes
        self._bad = BadImages()
        self._reader = self._open()
        self._next = start  # the first sample of the next batch to be prepared
        self._changes = deque(changes)
        self._prefetch = prefetch if workers else 0
        self._queue: deque[Work] = deque()
        self._planned: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque()
        if decoder == "dali_gpu":
            device = "cpu" if _dali_on_cpu else _gpu(device, resident)
            self._filler: Filler = DaliCropFiller(workers, crop, seed, self.clock, device)
        else:
            self._filler = (DaliFiller if decoder == "dali" else Filler)(workers, crop, seed, self.clock)
        self._closed = False

    @property
    def bad(self) -> BadImages:
        """What could not be read so far: `count`, `names`, `reasons`, `items()`."""
        return self._bad

    @property
    def position(self) -> int:
        """Samples used by the batches given so far; as `start` of a new loader it continues there."""
        return self._queue[0].first if self._queue else self._next

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("loader: it is closed, expected an open one because close() has ended its threads")
        began = time.perf_counter()
        try:
            while len(self._queue) <= self._prefetch:
                self._queue.append(self._prepare())
            batch = self._filler.finish(self._queue[0])
            self._queue.popleft()
            return batch
        finally:
            self.clock.add("wait", time.perf_counter() - began, self.batch_size)

    @property
    def wait_seconds(self) -> float:
        """Time the consumer spent blocked in next(), in all."""
        return self.clock.seconds["wait"]

    def resize(self, workers: int) -> None:
        """Another number of threads, for the batches that are begun from now on. A loader without threads, or one that
        is closed, stays as it is. Raises UserError for fewer than 1."""
        if workers < 1:
            fail("loader", "workers", workers, "at least 1", "no threads are for loaders made so")
        if self.workers and not self._closed and workers != self.workers:
            self._filler.resize(workers)
            self.workers = workers

    def close(self) -> None:
        """End the threads; what they were preparing is dropped. May be called twice."""
        self._closed = True
        self._queue.clear()
        self._filler.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self) -> None:
        """Take the size and batch size that hold from the next sample on."""
        while self._changes and self._changes[0].at <= self._next:
            _, size, self.batch_size = self._changes.popleft()
            self._planned.clear()
            if size != self.size:
                # a JPEG may be decoded at a reduced size that depends on the crop's, so decoded images are not shared
                self.size = size
                self._reader = self._open()

    def _open(self) -> Reader:
        side = min_decoded_side(self.size, self.crop)
        return Reader(self.source, self._decoder, side, self._cache_bytes, self._bad, self._resident)

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, ids and random words of the next batch, which are worked out for several batches at once."""
        if not self._planned:
            batches = max(1, _PLANNED // self.batch_size)
            firsts = self._next + self.batch_size * (self.rank + self.world * np.arange(batches))
            image, view = np.divmod(np.add.outer(firsts, np.arange(self.batch_size)).ravel(), self.repeat)
            epochs, ids = sample_at(image, len(self.source), self.seed)
            epochs = epochs * self.repeat + view
            parts = (np.split(x, batches) for x in (epochs, ids, crop_words(self.seed, epochs, ids)))
            self._planned.extend(zip(*parts))
        return self._planned.popleft()

    def _prepare(self) -> Work:
        """Lay out a batch and let it be filled."""
        self._change()
        epochs, ids, words = self._rows()
        img = torch.empty(self.batch_size, 3, self.size, self.size, dtype=torch.uint8, pin_memory=self._pin)
        labels = None if self.source.classes is None else torch.empty(self.batch_size, dtype=torch.int64)
        batch = Batch(img, torch.from_numpy(ids), torch.from_numpy(epochs), labels)
        work = Work(batch, words, self._next, self._reader, self.repeat)
        self._next += self.batch_size * self.world
        self._filler.start(work)
        return work


def load_all(source: Source, size: int, workers: int = 0, bad: BadImages | None = None) -> tuple[Tensor, Tensor | None]:
    """Every image once, in order, for evaluation: short side resized to `size`, centre cut.

    Images that cannot be read are left out, and put on `bad` when it is given.
    Returns img uint8 (N, 3, size, size) and labels int64 (N,), or None without classes.
    Raises UserError when none is readable.
    """
    reader = Reader(source, open_decoder("auto"), min_decoded_side(size, None), 0)
    img = torch.empty(len(source), 3, size, size, dtype=torch.uint8)

    def fill(i: int) -> bool:
        found = reader.image(i, Tally())
        image = None if found is None else found.pixels
        if image is not None:
            left, top, width, height = centre_box(image.shape[1], image.shape[0])
            box = np.array([[top, left, height, width]], np.int32)
            crop_rows([image], box, np.zeros(1, bool), "bicubic", img[i : i + 1].numpy())
        return image is not None

    if workers:
        with ThreadPoolExecutor(workers, "mimfast-load") as pool:
            usable = list(pool.map(fill, range(len(source))))
    else:
        usable = [fill(i) for i in range(len(source))]
    found = reader.bad.items()
    good = [i for i, ok in enumerate(usable) if ok]
    if not good:
        name, reason = found[0]
        raise UserError(f"load_all: source has no readable image among {len(source)} (the first: '{name}', {reason})")
    if bad is not None:
        for i in sorted(set(range(len(source))) - set(good)):
            bad.add(i, *found.pop(0))
    labels = None if source.classes is None else torch.tensor([source.label(i) for i in good])
    return img if len(good) == len(source) else img[good], labels


def _gpu(device: torch.device | str, resident: Resident | None) -> str:
    """The device of batches by 'dali_gpu'. Raises UserError."""
    if resident is not None:
        fail("loader", "decoder", "'dali_gpu'", "another one with a cache", "it makes crops out of files only")
    reason = why_not("dali_gpu")
    if reason:
        raise UserError(reason)
    if torch.device(device).type != "cuda":
        fail("loader", "decoder", "'dali_gpu'", f"another one on {device}", "it works on the GPU of the run")
    return str(device)


def _check_arguments(
    source: Source, size: int, batch_size: int, start: int, workers: int, rank: int, world: int, prefetch: int,
    repeat: int,
) -> None:  # fmt: skip
    if len(source) == 0:
        raise UserError("loader: source has no images, expected at least one because batches have a constant size")
    for name, value, least in (
        ("size", size, 1),
        ("batch_size", batch_size, 1),
        ("start", start, 0),
        ("workers", workers, 0),
        ("prefetch", prefetch, 0),
        ("world", world, 1),
        ("repeat", repeat, 1),
    ):
        if value < least:
            fail("loader", name, value, f"at least {least}", "a loader cannot work with less")
    if not 0 <= rank < world:
        fail("loader", "rank", rank, f"0 to {world - 1}", f"world is {world}")


def _check_changes(changes: Sequence[Change]) -> None:
    for before, change in zip((Change(0, 1, 1), *changes), changes):
        if min(change.size, change.batch_size) < 1:
            fail("loader", "changes", tuple(change), "sizes of at least 1", "a loader cannot work with less")
        if change.at < before.at:
            fail("loader", "changes", f"{change.at} after {before.at}", "ascending samples", "they come one by one")
