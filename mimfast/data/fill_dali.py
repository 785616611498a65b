"""Rows of a batch decoded by DALI, of each image the part that its crops show; the batch is that of `fill.Filler`.

What DALI should not have, or refuses, the portable decoder does: files that are not plain, and JPEG files so large that
they may be decoded at a reduced size. So pixels, bad images and their reasons are the same as without DALI.
"""

import threading
import time
from typing import NamedTuple

import numpy as np

from mimfast._check import UserError
from mimfast.data.clock import StageClock, Tally
from mimfast.data.crop import CropConfig, crop_boxes
from mimfast.data.dali import DaliParts, why_not
from mimfast.data.decode import BadImage
from mimfast.data.fill import Filler, Work
from mimfast.data.header import look
from mimfast.data.resident import Kept
from mimfast.ops.crop_resize import MAX_SIDE


class _File(NamedTuple):
    """rows: of the batch that show this image."""

    sample_id: int
    rows: list[int]
    data: bytes
    width: int
    height: int


class DaliFiller(Filler):
    """A Filler whose threads have a pipeline of DALI each. Raises UserError when DALI is not there."""

    def __init__(self, workers: int, crop: CropConfig, seed: int, clock: StageClock) -> None:
        reason = why_not()
        if reason:
            raise UserError(reason)
        super().__init__(workers, crop, seed, clock)
        self._local = threading.local()

    def _ahead(self, work: Work, first: int, last: int, tally: Tally) -> dict[int, Kept]:
        reader, ids = work.reader, work.batch.sample_ids.numpy()
        rows_of: dict[int, list[int]] = {}
        for row in range(first, last):
            rows_of.setdefault(int(ids[row]), []).append(row)
        found: dict[int, Kept | None] = {}
        files: list[_File] = []
        for i, rows in rows_of.items():
            data = None if i in reader.bad or reader.known(i) else reader.file(i, tally)
            if data is None:
                continue
            began = time.perf_counter()
            size = _size(data, reader.min_side)
            tally.add("decode", time.perf_counter() - began, 0)
            if size is None:
                found |= dict.fromkeys(rows, reader.image(i, tally, data))
            else:
                files.append(_File(i, rows, data, *size))
        if files:
            for file, image in zip(files, self._decode(work, files, tally)):
                image = image or reader.image(file.sample_id, tally, file.data)
                found |= dict.fromkeys(file.rows, image)
        return {row: image for row, image in found.items() if image is not None}

    def _decode(self, work: Work, files: list[_File], tally: Tally) -> list[Kept | None]:
        """None for a file that DALI refuses."""
        began, reader = time.perf_counter(), work.reader
        whole = reader.caches or reader.resident is not None
        widths = np.array([file.width for file in files])
        parts = [np.array([0, 0, file.height, file.width], np.int32) for file in files]
        if not whole:
            parts = [self._part(work, file) for file in files]
        found: list[Kept | None] = []
        pixels = self._pipeline(len(files)).run([file.data for file in files], np.stack(parts), widths)
        for file, part, image in zip(files, parts, pixels):
            if image is None:
                found.append(None)
            elif whole:  # a view would keep the images of all files
                kept = np.array(image) if reader.caches else image
                found.append(reader.keep(file.sample_id, kept, True, tally))
            else:
                found.append(Kept(image, file.width, file.height, int(part[0]), int(part[1])))
        tally.add("decode", time.perf_counter() - began, sum(image is not None for image in pixels))
        return found

    def _part(self, work: Work, file: _File) -> np.ndarray:
        """The smallest box around those of its rows."""
        sizes = np.tile([file.width, file.height], (len(file.rows), 1))
        boxes, _ = crop_boxes(work.words[file.rows], sizes[:, 0], sizes[:, 1], self.crop)
        start, end = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
        return np.concatenate([start, end - start])

    def _pipeline(self, files: int) -> DaliParts:
        """The one of this thread, for at least as many files."""
        found = getattr(self._local, "parts", None)
        if found is None or found.batch_size < files:
            found = self._local.parts = DaliParts(max(files, 16))
        return found


def _size(data: bytes, min_side: int) -> tuple[int, int] | None:
    """Width and height of an image that is for DALI, else None."""
    try:
        width, height, kind, _, plain = look(data)
    except BadImage:
        return None  # the portable decoder says it in its words
    reduced = kind == "jpeg" and min(width, height) >= 2 * min_side
    return (width, height) if plain and not reduced and max(width, height) <= MAX_SIDE else None
