"""The rows of a batch: read, decoded and cropped, with another image in place of one that cannot be read."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mimfast import philox
from mimfast._check import UserError
from mimfast.data.bad import BadImages
from mimfast.data.clock import StageClock, Tally
from mimfast.data.crop import CropConfig, crop_boxes, crop_rows, crop_words
from mimfast.data.decode import BadImage
from mimfast.data.decoders import Decoder
from mimfast.data.sources import Source, pixels_at
from mimfast.ops.crop_resize import MAX_SIDE

_RANDOM_ATTEMPTS = 8
_MAX_ATTEMPTS = 1000
_IMAGE_OVERHEAD = 512  # bytes of Python objects around the pixels of one cached image
_AT_ONCE = 8 << 20  # decoded pixels that wait to be cropped together


class Batch(NamedTuple):
    """img: uint8 (B, 3, S, S). sample_ids, epochs: int64 (B,), the images really used. labels: int64 (B,) or None.

    With `repeat` k there are k views of each image in an epoch of the source, and `epochs` counts views: k times the
    epoch, plus 0 to k - 1. Crops, masks and colours follow from it and the id.
    """

    img: Tensor
    sample_ids: Tensor
    epochs: Tensor
    labels: Tensor | None


class _Cache:
    """Decoded images, the least recently used dropped first once they exceed a number of bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> np.ndarray | None:
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def put(self, key: int, image: np.ndarray) -> None:
        weight = image.nbytes + _IMAGE_OVERHEAD
        if weight > self._budget:
            return
        with self._lock:
            if key in self._images:
                return
            self._images[key] = image
            self._used += weight
            while self._used > self._budget:
                self._used -= self._images.popitem(last=False)[1].nbytes + _IMAGE_OVERHEAD


class Reader:
    """Sample id -> pixels, through a cache of decoded images and the list of bad ones.

    min_side: see `decode.decode`. cache_bytes: memory for decoded images; 0: none.
    """

    def __init__(
        self, source: Source, decoder: Decoder, min_side: int, cache_bytes: int, bad: BadImages | None = None
    ) -> None:
        self.source, self.decoder = source, decoder
        self.bad = BadImages() if bad is None else bad
        self._min_side = min_side
        self._cache = _Cache(cache_bytes)

    def pixels(self, sample_id: int, tally: Tally) -> np.ndarray | None:
        """uint8 (H, W, 3); None when the image is bad."""
        image = self._cache.get(sample_id)
        if image is not None or sample_id in self.bad:
            return image
        try:
            image = self._load(sample_id, tally)
            if max(image.shape) > MAX_SIDE:
                raise BadImage(f"{image.shape[1]}x{image.shape[0]} has a side of more than {MAX_SIDE} pixels")
            return image
        except BadImage as error:
            reason = error.reason
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
        self.bad.add(sample_id, self.source.name(sample_id), reason)
        return None

    def _load(self, sample_id: int, tally: Tally) -> np.ndarray:
        began = time.perf_counter()
        image = pixels_at(self.source, sample_id)
        data = self.source.read(sample_id) if image is None else b""
        read = time.perf_counter()
        tally.add("read", read - began)
        if image is None:
            image = self.decoder.pixels(data, self._min_side)
            tally.add("decode", time.perf_counter() - read)
            self._cache.put(sample_id, image)
        return image


@dataclass
class Work:
    """A batch being filled.

    words: int64 (B, W), the random words of each row's crop. first: its place in the order of samples, over all
    processes. reader: the one of its size. repeat: as many neighbouring rows show one image.
    """

    batch: Batch
    words: np.ndarray
    first: int
    reader: Reader
    repeat: int = 1
    futures: list[Future] = field(default_factory=list)


class Filler:
    """Fills batches on `workers` threads, or in the caller with none. seed: of replacements and their crops."""

    def __init__(self, workers: int, crop: CropConfig, seed: int, clock: StageClock) -> None:
        self.workers, self.crop, self.seed, self.clock = workers, crop, seed, clock
        self._pool = ThreadPoolExecutor(workers, "mimfast-loader") if workers else None
        self._former: list[ThreadPoolExecutor] = []

    def start(self, work: Work) -> None:
        """Hand the rows to the threads in runs: several for each, to even out slow images."""
        if self._pool is None:
            return
        size = len(work.words)
        rows = -(-max(1, size // (4 * self.workers)) // work.repeat) * work.repeat
        for a in range(0, size, rows):
            work.futures.append(self._pool.submit(self._fill, work, a, min(a + rows, size)))

    def finish(self, work: Work) -> Batch:
        """The batch once it is whole. Raises what went wrong."""
        if self._pool is None:
            self._fill(work, 0, len(work.words))
        for future in work.futures:
            future.result()
        return work.batch

    def resize(self, workers: int) -> None:
        """Other threads for what is started from now on; those there are finish what they have and end."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._former.append(self._pool)
            self.workers, self._pool = workers, ThreadPoolExecutor(workers, "mimfast-loader")

    def close(self, wait: bool = True) -> None:
        """End the threads. May be called twice."""
        for pool in [*self._former, self._pool]:
            if pool is not None:
                pool.shutdown(wait=wait, cancel_futures=True)

    def __del__(self) -> None:
        # Threads of a forgotten loader must not outlive it; it may be half built, or the interpreter on its way out.
        with contextlib.suppress(Exception):
            self.close(wait=False)

    def _fill(self, work: Work, first: int, last: int) -> None:
        """Rows first to last, cropped as soon as enough pixels have come together."""
        tally, ids, labels = Tally(), work.batch.sample_ids.numpy(), work.batch.labels
        images: list[np.ndarray] = []
        known: dict[int, np.ndarray] = {}
        waiting = 0
        for row in range(first, last):
            planned = int(ids[row])
            image = known.get(planned)
            if image is None:
                image = self._usable(work, row, tally)
                # neighbours are views of one image; a replacement is each view's own
                known = {planned: image} if work.repeat > 1 and ids[row] == planned else {}
            if labels is not None:
                labels[row] = work.reader.source.label(int(ids[row])) or 0
            images.append(image)
            waiting += image.nbytes
            if waiting >= _AT_ONCE:
                self._crop(work, row + 1 - len(images), images, tally)
                images, waiting = [], 0
        if images:
            self._crop(work, last - len(images), images, tally)
        self.clock.merge(tally)

    def _crop(self, work: Work, first: int, images: list[np.ndarray], tally: Tally) -> None:
        began = time.perf_counter()
        rows = slice(first, first + len(images))
        heights, widths = np.array([image.shape[:2] for image in images]).T
        boxes, flip = crop_boxes(work.words[rows], widths, heights, self.crop)
        crop_rows(images, boxes, flip, self.crop.filter, work.batch.img.numpy()[rows])
        tally.add("crop", time.perf_counter() - began, len(images))

    def _usable(self, work: Work, row: int, tally: Tally) -> np.ndarray:
        """The image of a row; when it is bad, that of a replacement, whose id and words the row gets."""
        reader, ids, epochs = work.reader, work.batch.sample_ids.numpy(), work.batch.epochs.numpy()
        image = reader.pixels(int(ids[row]), tally)
        if image is not None:
            return image
        for candidate in _replacements(self.seed, int(epochs[row]), int(ids[row]), len(reader.source)):
            image = reader.pixels(candidate, tally)
            if image is not None:
                ids[row] = candidate
                work.words[row] = crop_words(self.seed, epochs[row : row + 1], ids[row : row + 1])[0]
                return image
        name, reason = reader.bad.items()[0]
        raise UserError(
            f"loader: source has no readable image among {reader.bad.count} tried of {len(reader.source)} "
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
