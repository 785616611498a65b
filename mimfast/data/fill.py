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
from mimfast.data.resident import Kept, Resident
from mimfast.data.sources import Source, pixels_at
from mimfast.ops.crop_resize import MAX_SIDE

_RANDOM_ATTEMPTS = 8
_MAX_ATTEMPTS = 1000
_IMAGE_OVERHEAD = 512  # bytes of Python objects around the pixels of one cached image
_AHEAD = 16  # rows that a decoder of batches gets together
_AT_ONCE = 8 << 20  # decoded pixels that wait to be cropped together


class Batch(NamedTuple):
    """img: uint8 (B, 3, S, S), in the memory of the machine or, by a cache there, on a GPU. sample_ids, epochs: int64
    (B,), the images really used. labels: int64 (B,) or None.

    With `repeat` k there are k views of each image in an epoch of the source, and `epochs` counts views: k times the
    epoch, plus 0 to k - 1. Crops, masks and colours follow from it and the id.
    """

    img: Tensor
    sample_ids: Tensor
    epochs: Tensor
    labels: Tensor | None


class _Cache:
    """Decoded images, the least recently used dropped first once they exceed a number of bytes. `full`: it holds no
    more, or would drop others for it."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self.full = budget <= 0
        self._used = 0
        self._images: OrderedDict[int, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> Kept | None:
        with self._lock:
            image = self._images.get(key)
            if image is not None:
                self._images.move_to_end(key)
            return image

    def put(self, key: int, image: Kept) -> None:
        weight = _weight(image)
        if weight > self._budget:
            self.full = True
            return
        with self._lock:
            if key in self._images:
                return
            self._images[key] = image
            self._used += weight
            while self._used > self._budget:
                self.full = True
                self._used -= _weight(self._images.popitem(last=False)[1])


def _weight(image: Kept) -> int:
    return _IMAGE_OVERHEAD + _nbytes(image)


def _nbytes(image: Kept) -> int:
    return 0 if image.pixels is None else image.pixels.nbytes


class Reader:
    """Sample id -> what its crops come out of, through a cache of decoded images and the list of bad ones.

    min_side: see `decode.decode`. cache_bytes: memory for decoded images; 0: none. resident: keeps all of them from
    the first time on, or copies of one size, which decide `min_side`.
    """

    def __init__(
        self, source: Source, decoder: Decoder, min_side: int, cache_bytes: int, bad: BadImages | None = None,
        resident: Resident | None = None,
    ) -> None:  # fmt: skip
        self.source, self.decoder, self.resident = source, decoder, resident
        self.bad = BadImages() if bad is None else bad
        self.min_side = min_side if resident is None or resident.side is None else resident.side
        self._same = None if resident is None else resident.usable(self.min_side)
        self._cache = _Cache(cache_bytes)

    @property
    def caches(self) -> bool:
        """Decoded images are kept for later, and there is room."""
        return not self._cache.full

    def known(self, sample_id: int) -> Kept | None:
        """An image that is there already."""
        return self._there(sample_id) or self._cache.get(sample_id)

    def image(self, sample_id: int, tally: Tally, data: bytes | None = None) -> Kept | None:
        """None when the image is bad. data: its file, where that has been read already."""
        image = self.known(sample_id)
        if image is not None or sample_id in self.bad:
            return image
        try:
            pixels, decoded = self._load(sample_id, tally, data)
            return self.keep(sample_id, pixels, decoded, tally)
        except (BadImage, OSError) as error:
            self._refuse(sample_id, error)
        return None

    def file(self, sample_id: int, tally: Tally) -> bytes | None:
        """The bytes of a file; None when it cannot be read, or the source keeps pixels."""
        began = time.perf_counter()
        try:
            return self.source.read(sample_id) if pixels_at(self.source, sample_id) is None else None
        except OSError as error:
            self._refuse(sample_id, error)
        finally:
            tally.add("read", time.perf_counter() - began)
        return None

    def keep(self, sample_id: int, pixels: np.ndarray, decoded: bool, tally: Tally) -> Kept:
        """What the crops of a whole image come out of, kept for later. Raises BadImage."""
        if max(pixels.shape) > MAX_SIDE:
            raise BadImage(f"{pixels.shape[1]}x{pixels.shape[0]} has a side of more than {MAX_SIDE} pixels")
        image = self._keep(sample_id, pixels, tally)
        if decoded or image.pixels is not pixels:
            self._cache.put(sample_id, image)
        return image

    def _refuse(self, sample_id: int, error: BadImage | OSError) -> None:
        said = error.reason if isinstance(error, BadImage) else f"cannot be read: {error.strerror or error}"
        self.bad.add(sample_id, self.source.name(sample_id), said)

    def _there(self, sample_id: int) -> Kept | None:
        """From the resident, unless it was decoded to another size there."""
        if self.resident is None or not (self._same is None or self._same[sample_id]):
            return None
        return self.resident.get(sample_id)

    def _load(self, sample_id: int, tally: Tally, data: bytes | None) -> tuple[np.ndarray, bool]:
        """Pixels, and whether they had to be decoded."""
        pixels = None
        if data is None:
            began = time.perf_counter()
            pixels = pixels_at(self.source, sample_id)
            data = self.source.read(sample_id) if pixels is None else None
            tally.add("read", time.perf_counter() - began)
        read = time.perf_counter()
        if data is not None:
            pixels = self.decoder.pixels(data, self.min_side)
            tally.add("decode", time.perf_counter() - read)
            return pixels, True
        assert pixels is not None
        return pixels, False

    def _keep(self, sample_id: int, pixels: np.ndarray, tally: Tally) -> Kept:
        if self.resident is None:
            return Kept(pixels, pixels.shape[1], pixels.shape[0])
        began = time.perf_counter()
        image = self.resident.put(sample_id, pixels)
        tally.add("crop", time.perf_counter() - began, 0)
        return image


@dataclass
class Work:
    """A batch being filled.

    words: int64 (B, W), the random words of each row's crop. first: its place in the order of samples, over all
    processes. reader: the one of its size. repeat: as many neighbouring rows show one image. `held` (B,) are the rows
    whose pixels only a GPU has; their boxes (B, 4) and flips (B,) wait until the batch is wanted.
    """

    batch: Batch
    words: np.ndarray
    first: int
    reader: Reader
    repeat: int = 1
    futures: list[Future] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.words) if self.reader.resident is not None and self.reader.resident.on_device else 0
        self.held, self.flip, self.boxes = np.zeros(rows, bool), np.zeros(rows, bool), np.zeros((rows, 4), np.int32)


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
        return self._held_rows(work) if work.held.any() else work.batch

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
        images: list[Kept] = []
        known: dict[int, Kept] = {}
        ahead: dict[int, Kept] = {}
        waiting = 0
        step = -(-_AHEAD // work.repeat) * work.repeat
        for row in range(first, last):
            if (row - first) % step == 0:
                ahead = self._ahead(work, row, min(row + step, last), tally)
            planned = int(ids[row])
            image = ahead.get(row) or known.get(planned)
            if image is None:
                image = self._usable(work, row, tally)
                # neighbours are views of one image; a replacement is each view's own
                known = {planned: image} if work.repeat > 1 and ids[row] == planned else {}
            if labels is not None:
                labels[row] = work.reader.source.label(int(ids[row])) or 0
            images.append(image)
            waiting += _nbytes(image)
            if waiting >= _AT_ONCE:
                self._crop(work, row + 1 - len(images), images, tally)
                images, waiting = [], 0
        if images:
            self._crop(work, last - len(images), images, tally)
        self.clock.merge(tally)

    def _ahead(self, work: Work, first: int, last: int, tally: Tally) -> dict[int, Kept]:
        """row -> image, for rows first to last that are better decoded together; others come one by one."""
        return {}

    def _crop(self, work: Work, first: int, images: list[Kept], tally: Tally) -> None:
        began = time.perf_counter()
        rows, resident = slice(first, first + len(images)), work.reader.resident
        widths, heights = np.array([(image.width, image.height) for image in images]).T
        boxes, flip = crop_boxes(work.words[rows], widths, heights, self.crop)
        out = work.batch.img.numpy()[rows]
        pixels = [image.pixels for image in images if image.pixels is not None]
        here = np.array([image.pixels is not None for image in images])
        if not here.all():
            work.held[rows], work.boxes[rows], work.flip[rows] = ~here, boxes, flip
        if pixels:
            there = boxes if resident is None else resident.place(boxes, widths, heights)
            there = there - np.array([(image.top, image.left, 0, 0) for image in images], np.int32)
            some = out if here.all() else np.empty((len(pixels), *out.shape[1:]), np.uint8)
            crop_rows(pixels, there[here], flip[here], self.crop.filter, some)
            if some is not out:
                out[here] = some
        tally.add("crop", time.perf_counter() - began, len(images))

    def _held_rows(self, work: Work) -> Batch:
        """The batch on the GPU, with the rows that are cropped there."""
        resident, img = work.reader.resident, work.batch.img
        assert resident is not None
        assert resident.device is not None
        rows = np.flatnonzero(work.held)
        ids, boxes, flip = work.batch.sample_ids.numpy()[rows], work.boxes[rows], work.flip[rows]
        crops = resident.crop(ids, boxes, flip, img.shape[-1], self.crop.filter)
        if len(rows) < len(img):
            (place,) = resident.move(rows)
            crops = img.to(resident.device, non_blocking=True).index_copy_(0, place, crops)
        return work.batch._replace(img=crops)

    def _usable(self, work: Work, row: int, tally: Tally) -> Kept:
        """The image of a row; when it is bad, that of a replacement, whose id and words the row gets."""
        reader, ids, epochs = work.reader, work.batch.sample_ids.numpy(), work.batch.epochs.numpy()
        image = reader.image(int(ids[row]), tally)
        if image is not None:
            return image
        for candidate in _replacements(self.seed, int(epochs[row]), int(ids[row]), len(reader.source)):
            image = reader.image(candidate, tally)
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
