"""Whole batches cropped by DALI on the device of a run; a batch has the ids, labels, boxes and flips of `fill.Filler`.

Threads read the files and look at their headers. The plain files of a batch go to one pipeline, which works on the next
batch while one is used; all others, and those that it refuses, are decoded and cropped the portable way and put into
their rows. DALI resizes in its own way, so pixels are near those of the other decoders and not the same.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.data.clock import StageClock, Tally
from mimfast.data.crop import CropConfig, crop_boxes
from mimfast.data.dali import Crops, DaliCrops, why_not
from mimfast.data.decode import BadImage
from mimfast.data.decoders import reduction
from mimfast.data.fill import Batch, Filler, Work
from mimfast.data.header import look
from mimfast.data.resident import Kept
from mimfast.ops.crop_resize import MAX_SIDE

_MOST_BYTES = 32 << 20  # of a decoded image: a batch of larger ones would take the memory of the network
_FED = 2  # batches that a pipeline takes before the first is collected


class _Plain(NamedTuple):
    """A file for DALI. shrink: what the portable decoder would reduce the image by, boxes being chosen after that."""

    data: bytes
    width: int
    height: int
    shrink: int


class _Job:
    """A batch on its way. files, boxes int32 (B, 4), flip (B,): of the rows for DALI. left: rows still to be gathered.
    crops: the pipeline that it was fed to. made: what came out of it."""

    def __init__(self, work: Work) -> None:
        n = len(work.words)
        self.work, self.left = work, n
        self.files: list[bytes | None] = [None] * n
        self.boxes, self.flip = np.zeros((n, 4), np.int32), np.zeros(n, bool)
        self.crops: DaliCrops | None = None
        self.made: Crops | None = None


class DaliCropFiller(Filler):
    """A Filler whose batches are on `device`, "cuda", "cuda:1" or "cpu". Repeated views are decoded one by one, and a
    batch of another size gets another pipeline. Raises UserError when DALI or the GPU is not there."""

    def __init__(self, workers: int, crop: CropConfig, seed: int, clock: StageClock, device: str) -> None:
        reason = why_not()
        if reason:
            raise UserError(reason)
        super().__init__(workers, crop, seed, clock)
        self.device = device
        self._feeder = ThreadPoolExecutor(1, "mimfast-dali") if workers else None
        self._jobs: dict[int, _Job] = {}  # by `Work.first`, in order
        self._refused: set[int] = set()  # ids that cost a new pipeline each time
        self._crops: DaliCrops | None = None
        self._turn, self._counting = threading.Lock(), threading.Lock()  # of the pipelines, of `_Job.left`

    def start(self, work: Work) -> None:
        self._jobs[work.first] = _Job(work)
        super().start(work)

    def finish(self, work: Work) -> Batch:
        job = self._jobs[work.first]
        if self._pool is None:
            self._fill(work, 0, len(work.words))
        for future in work.futures:
            future.result()
        began = time.perf_counter()
        with self._turn:
            self._feed()
            assert job.crops is not None
            job.made = job.made or job.crops.collect()
        self.clock.add("decode", time.perf_counter() - began, sum(file is not None for file in job.files))
        img = self._complete(job, job.made)
        del self._jobs[work.first]
        if self._feeder is not None:
            self._feeder.submit(self._feed_in_turn)
        return work.batch._replace(img=img)

    def close(self, wait: bool = True) -> None:
        super().close(wait)
        if self._feeder is not None:
            self._feeder.shutdown(wait=wait, cancel_futures=True)
        for crops in {job.crops for job in self._jobs.values()} | {self._crops}:
            if crops is not None:
                crops.close()
        self._jobs.clear()
        self._crops = None

    def _fill(self, work: Work, first: int, last: int) -> None:
        job, tally, ids, labels = self._jobs[work.first], Tally(), work.batch.sample_ids.numpy(), work.batch.labels
        seen, found = -1, None  # neighbours may be views of one image
        for row in range(first, last):
            planned = int(ids[row])
            if planned != seen:
                seen, found = planned, self._read(work, planned, tally)
            if isinstance(found, _Plain):
                self._place(job, row, found, tally)
            else:
                self._crop(work, row, [found or self._usable(work, row, tally)], tally)
            if labels is not None:
                labels[row] = work.reader.source.label(int(ids[row])) or 0
        self.clock.merge(tally)
        with self._counting:
            job.left -= last - first
            whole = job.left == 0
        if whole and self._feeder is not None:
            self._feeder.submit(self._feed_in_turn)

    def _read(self, work: Work, i: int, tally: Tally) -> _Plain | Kept | None:
        """A file for DALI, or pixels, or None for a bad image. Which of them is the same every time: it does not depend
        on what is in the cache or on the list of bad images."""
        reader = work.reader
        data = None if i in self._refused else reader.file(i, tally)
        if data is None:
            return reader.image(i, tally)
        began = time.perf_counter()
        plain = _plain(data, reader.min_side)
        tally.add("decode", time.perf_counter() - began, 0)
        return plain or reader.image(i, tally, data)

    def _place(self, job: _Job, row: int, file: _Plain, tally: Tally) -> None:
        began, whole = time.perf_counter(), np.array([file.height, file.width])
        height, width = -(-whole // file.shrink)
        boxes, flip = crop_boxes(job.work.words[row : row + 1], np.array([width]), np.array([height]), self.crop)
        start, side = file.shrink * boxes[0, :2], file.shrink * boxes[0, 2:]
        job.boxes[row], job.flip[row] = np.concatenate([start, np.minimum(side, whole - start)]), flip[0]
        job.files[row] = file.data
        tally.add("crop", time.perf_counter() - began)

    def _feed_in_turn(self) -> None:
        with self._turn:
            self._feed()

    def _feed(self) -> None:
        """Batches in order, as far as they are gathered and there is room."""
        for job in list(self._jobs.values())[:_FED]:
            if job.left:
                return
            if job.crops is None:
                crops = self._pipeline(job.work.batch.img)
                crops.feed(job.files, job.boxes, job.flip)
                job.crops = crops

    def _pipeline(self, img: Tensor) -> DaliCrops:
        size, batch_size = img.shape[-1], len(img)
        if self._crops is None or (self._crops.size, self._crops.batch_size) != (size, batch_size):
            self._crops = DaliCrops(size, batch_size, self.crop.filter, max(1, self.workers), self.device)
        return self._crops

    def _complete(self, job: _Job, made: Crops) -> Tensor:
        """The batch with the rows that DALI did not make."""
        (img, refused), work, tally = made, job.work, Tally()
        ids, labels = work.batch.sample_ids.numpy(), work.batch.labels
        for row in sorted(refused):
            self._refused.add(int(ids[row]))
            self._crop(work, row, [self._usable(work, row, tally)], tally)
            if labels is not None:
                labels[row] = work.reader.source.label(int(ids[row])) or 0
        self.clock.merge(tally)
        rows = torch.tensor(sorted({*refused, *(row for row, file in enumerate(job.files) if file is None)}))
        if not len(rows):
            return img
        place, crops = rows, work.batch.img[rows]
        if img.is_cuda:  # page-locked, so that the host does not wait
            place, crops = (part.pin_memory().to(img.device, non_blocking=True) for part in (place, crops))
        return img.index_copy_(0, place, crops)


def _plain(data: bytes, min_side: int) -> _Plain | None:
    """A file that is for DALI, else None."""
    try:
        header = look(data)
    except BadImage:
        return None  # the portable decoder says it in its words
    width, height = header.width, header.height
    fits = 3 * width * height <= _MOST_BYTES and max(width, height) <= MAX_SIDE
    if not (header.plain and fits):
        return None
    return _Plain(data, width, height, reduction(header, min_side) if header.format == "jpeg" else 1)
