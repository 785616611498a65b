"""Endless batches of random crops, decoded by threads (Pillow releases the interpreter lock while it works).

What a batch holds is a pure function of (source, seed, first sample, size): the number of workers, the prefetch depth,
the cache and the number of processes that share the work change only the speed. Resuming is
`start=<samples already used>`.
B samples of a batch, S side of the crop in pixels.
"""

import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimfast import philox
from mimfast._check import UserError, fail
from mimfast.data.cpu import default_workers as default_workers
from mimfast.data.crop import CropConfig, centre_box, crop_box, crop_words, min_decoded_side, resample
from mimfast.data.decode import BadImage, decode_image
from mimfast.data.order import sample_at
from mimfast.data.sources import Source

_RANDOM_ATTEMPTS = 8
_MAX_ATTEMPTS = 1000
_CACHE_BYTES = 256 << 20
_MAE_CROP = CropConfig()
_IMAGE_OVERHEAD = 1024  # bytes of Python objects around the pixels of one cached image


class Batch(NamedTuple):
    """img: uint8 (B, 3, S, S). sample_ids, epochs: int64 (B,), the images really used. labels: int64 (B,) or None."""

    img: Tensor
    sample_ids: Tensor
    epochs: Tensor
    labels: Tensor | None


class BadImages:
    """The images that could not be read: id -> (name, reason), each tried once and never again."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, sample_id: int, name: str, reason: str) -> None:
        with self._lock:
            self._found.setdefault(sample_id, (name, reason))

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def count(self) -> int:
        return len(self._found)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.items()]

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.items()]

    def items(self) -> list[tuple[str, str]]:
        """(name, reason) in order of sample id, the same for any number of workers."""
        with self._lock:
            return [self._found[i] for i in sorted(self._found)]


class _Cache:
    """Decoded images, the least recently used dropped first once they exceed a number of bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._images: OrderedDict[int, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> Image.Image | None:
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def put(self, key: int, image: Image.Image) -> None:
        if _weight(image) > self._budget:
            return
        with self._lock:
            if key in self._images:
                return
            self._images[key] = image
            self._used += _weight(image)
            while self._used > self._budget:
                self._used -= _weight(self._images.popitem(last=False)[1])


def _weight(image: Image.Image) -> int:
    return 4 * image.width * image.height + _IMAGE_OVERHEAD  # Pillow keeps RGB in four bytes


class _Reader:
    """Sample id -> decoded image, through the cache and the list of bad images."""

    def __init__(self, source: Source, min_side: int, cache_bytes: int, bad: BadImages | None = None) -> None:
        self.source = source
        self.bad = BadImages() if bad is None else bad
        self._min_side = min_side
        self._cache = _Cache(cache_bytes)

    def image(self, sample_id: int) -> Image.Image | None:
        """None when the image is bad."""
        image = self._cache.get(sample_id)
        if image is not None or sample_id in self.bad:
            return image
        try:
            image = decode_image(self.source.read(sample_id), self._min_side)
        except BadImage as error:
            self.bad.add(sample_id, self.source.name(sample_id), error.reason)
        except OSError as error:
            self.bad.add(sample_id, self.source.name(sample_id), f"cannot be read: {error.strerror or error}")
        if image is not None:
            self._cache.put(sample_id, image)
        return image


class _Work(NamedTuple):
    """A batch being filled. words: int64 (B, W), the random words of each row's crop. first: its place in the order of
    samples, over all processes. reader: the one of its size.
    """

    batch: Batch
    words: np.ndarray
    futures: list[Future]
    first: int
    reader: _Reader


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
    so that no sample is lost or repeated, and those before `start` have taken effect already.

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
    ) -> None:
        _check_arguments(source, size, batch_size, start, workers, rank, world, prefetch)
        _check_changes(changes)
        philox.check_seed("loader", seed)
        self.source, self.size, self.batch_size, self.seed = source, size, batch_size, seed
        self.rank, self.world, self.workers, self.crop = rank, world, workers, crop
        self.wait_seconds = 0.0  # time the consumer spent blocked in next(), in all
        self._cache_bytes = cache_bytes
        self._reader = _Reader(source, min_decoded_side(size, crop), cache_bytes)
        self._next = start  # the first sample of the next batch to be prepared
        self._changes = deque(changes)
        self._prefetch = prefetch
        self._queue: deque[_Work] = deque()
        self._pool = ThreadPoolExecutor(workers, "mimfast-loader") if workers else None
        self._closed = False

    @property
    def bad(self) -> BadImages:
        """What could not be read so far: `count`, `names`, `reasons`, `items()`."""
        return self._reader.bad

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
            while len(self._queue) <= (self._prefetch if self._pool else 0):
                self._queue.append(self._prepare())
            work = self._queue[0]
            if self._pool is None:
                self._fill(work, 0, len(work.words))
            for future in work.futures:
                future.result()
            self._queue.popleft()
            return work.batch
        finally:
            self.wait_seconds += time.perf_counter() - began

    def close(self) -> None:
        """End the threads; what they were preparing is dropped. May be called twice."""
        self._closed = True
        self._queue.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Threads of a forgotten loader must not outlive it; it may be half built, or the interpreter on its way out.
        with contextlib.suppress(Exception):
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def _change(self) -> None:
        """Take the size and batch size that hold from the next sample on."""
        while self._changes and self._changes[0].at <= self._next:
            _, size, self.batch_size = self._changes.popleft()
            if size != self.size:
                # a JPEG may be decoded at a reduced size that depends on the crop's, so decoded images are not shared
                self.size, side = size, min_decoded_side(size, self.crop)
                self._reader = _Reader(self.source, side, self._cache_bytes, self._reader.bad)

    def _prepare(self) -> _Work:
        """Lay out a batch and hand it to the threads in runs of rows: several for each, to even out slow images."""
        self._change()
        first = self._next + self.rank * self.batch_size
        epochs, ids = sample_at(np.arange(first, first + self.batch_size), len(self.source), self.seed)
        img = torch.empty(self.batch_size, 3, self.size, self.size, dtype=torch.uint8)
        labels = None if self.source.classes is None else torch.empty(self.batch_size, dtype=torch.int64)
        batch = Batch(img, torch.from_numpy(ids), torch.from_numpy(epochs), labels)
        work = _Work(batch, crop_words(self.seed, epochs, ids), [], self._next, self._reader)
        self._next += self.batch_size * self.world
        if self._pool is not None:
            rows = max(1, self.batch_size // (4 * self.workers))
            for a in range(0, self.batch_size, rows):
                work.futures.append(self._pool.submit(self._fill, work, a, min(a + rows, self.batch_size)))
        return work

    def _fill(self, work: _Work, first: int, last: int) -> None:
        """Rows first to last: decode, replace what is bad, crop."""
        img, ids, epochs = (tensor.numpy() for tensor in work.batch[:3])
        for row in range(first, last):
            planned = int(ids[row])
            image = self._usable(work.reader, ids, int(epochs[row]), row)
            words = work.words[row]
            if ids[row] != planned:
                words = crop_words(self.seed, epochs[row : row + 1], ids[row : row + 1])[0]
            box, flip = crop_box(words, image.width, image.height, self.crop)
            resample(image, box, img.shape[-1], flip, img[row], self.crop.filter)
            if work.batch.labels is not None:
                work.batch.labels[row] = self.source.label(int(ids[row])) or 0

    def _usable(self, reader: _Reader, ids: np.ndarray, epoch: int, row: int) -> Image.Image:
        """The image of ids[row]; when it is bad, ids[row] becomes the id of the replacement."""
        image = reader.image(int(ids[row]))
        if image is not None:
            return image
        for candidate in _replacements(self.seed, epoch, int(ids[row]), len(self.source)):
            image = reader.image(candidate)
            if image is not None:
                ids[row] = candidate
                return image
        name, reason = self.bad.items()[0]
        raise UserError(
            f"loader: source has no readable image among {self.bad.count} tried of {len(self.source)} "
            f"(the first: '{name}', {reason}), expected at least one because bad images are replaced by good ones"
        )


def _replacements(seed: int, epoch: int, sample_id: int, n: int) -> Iterator[int]:
    """Ids to try instead of a bad one: a few at random, then the ones that follow the last, up to 1000 in all."""
    words = philox.words(seed, philox.STREAM_REPLACE, epoch, np.array([sample_id]), _RANDOM_ATTEMPTS)[0]
    candidate = sample_id
    for word in words.tolist():
        candidate = (word * n) >> 32
        yield candidate
    for step in range(1, min(n, _MAX_ATTEMPTS)):
        yield (candidate + step) % n


def load_all(source: Source, size: int, workers: int = 0, bad: BadImages | None = None) -> tuple[Tensor, Tensor | None]:
    """Every image once, in order, for evaluation: short side resized to `size`, centre cut.

    Images that cannot be read are left out, and put on `bad` when it is given.
    Returns img uint8 (N, 3, size, size) and labels int64 (N,), or None without classes.
    Raises UserError when none is readable.
    """
    reader = _Reader(source, min_decoded_side(size, None), 0)
    img = torch.empty(len(source), 3, size, size, dtype=torch.uint8)

    def fill(i: int) -> bool:
        image = reader.image(i)
        if image is not None:
            resample(image, centre_box(image.width, image.height), size, False, img[i].numpy())
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


def _check_arguments(
    source: Source, size: int, batch_size: int, start: int, workers: int, rank: int, world: int, prefetch: int
) -> None:
    if len(source) == 0:
        raise UserError("loader: source has no images, expected at least one because batches have a constant size")
    for name, value, least in (
        ("size", size, 1),
        ("batch_size", batch_size, 1),
        ("start", start, 0),
        ("workers", workers, 0),
        ("prefetch", prefetch, 0),
        ("world", world, 1),
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
