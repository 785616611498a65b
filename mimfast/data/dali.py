"""JPEG and PNG files decoded by NVIDIA DALI 2, on the CPU or on a GPU: parts of images, or whole random-resized-crops.

DALI gives up a pipeline for good at the first file that it cannot decode, and its version 2.4 may even end the process
when it cannot parse one in a batch of many. So each file is first parsed alone, as DALI will do it, which takes 2 us,
and held against its box. One that is damaged further in is found by decoding the files of its batch one by one, and
costs a new pipeline, never another row. Order and boxes are the caller's: a pipeline knows no epoch.
B files of a batch, S side of the crop in pixels.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimfast._check import UserError, check_dtype, check_shape, fail
from mimfast.data.decode import MAX_PIXELS, BadImage, decode
from mimfast.data.pixels import ppm
from mimfast.ops.crop_resize import FILTERS, Filter

INSTALL = "pip install 'mimfast[dali]'"
_DEPTH = 2  # batches that a pipeline works on at a time
_CODECS = ("jpeg", "png")
# For narrower parts of an image libjpeg-turbo interpolates colour less finely at the edge than for the whole image.
_LEAST_WIDTH = 16


class Crops(NamedTuple):
    """img: uint8 (B, 3, S, S). refused: row -> reason, of the files that DALI could not decode; their rows, and those
    that came without a file, hold anything."""

    img: Tensor
    refused: dict[int, str]


def why_not() -> str | None:
    """One sentence when DALI is not there, else None."""
    try:
        _import()
    except UserError as error:
        return str(error)
    return None


class DaliCrops:
    """Files to square crops in one pipeline: decode the box, resize with antialias, mirror, channels first.

    size: S. batch_size: most files of a batch. filter: of the resampling. threads: that decode. device: "cpu" needs no
    CUDA at all; "cuda" or "cuda:1" decodes on that GPU, with `hw_decoder_load` of the work on its JPEG engines.
    Two batches may be fed before the first is collected: they are worked on meanwhile.

    Raises UserError when DALI or the GPU is not there, and for arguments out of range.
    """

    def __init__(
        self, size: int, batch_size: int, filter: Filter = "bicubic", threads: int = 1, device: str = "cpu",
        hw_decoder_load: float = 0.65,
    ) -> None:  # fmt: skip
        if filter not in FILTERS:
            fail("dali", "filter", repr(filter), " or ".join(map(repr, FILTERS)), "no other filter is defined")
        for name, value in (("size", size), ("batch_size", batch_size), ("threads", threads)):
            if value < 1:
                fail("dali", name, value, "at least 1", "a pipeline cannot work with less")
        if not 0 <= hw_decoder_load <= 1:
            fail("dali", "hw_decoder_load", hw_decoder_load, "0 to 1", "it is a share of the images")
        self.size, self.batch_size, self.device = size, batch_size, _device(device)
        on_gpu = self.device.type == "cuda"

        def graph(dali: Any, file: Any, start: Any, shape: Any, width: Any) -> Any:
            gpu = {"hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True} if on_gpu else {}
            part = dali.fn.decoders.image_slice(
                file, start, shape, axes=(0, 1), device="mixed" if on_gpu else "cpu", adjust_orientation=False, **gpu
            )
            interpolation = dali.types.INTERP_CUBIC if filter == "bicubic" else dali.types.INTERP_LINEAR
            square = dali.fn.resize(
                part, resize_x=width, resize_y=float(size), mode="stretch", interp_type=interpolation, antialias=True
            )
            return dali.fn.transpose(square, perm=[2, 0, 1])

        self._line = _Line(graph, True, batch_size, threads, self.device.index if on_gpu else None)

    def feed(self, files: Sequence[bytes | None], boxes: np.ndarray, flip: np.ndarray) -> None:
        """Start a batch.

        files: up to batch_size whole files, plain as `header.look` has it; None leaves a row to the caller. boxes:
        int32 (B, 4), top, left, height, width, inside the image. flip: bool (B,).
        """
        if not 1 <= len(files) <= self.batch_size:
            fail("dali", "files", len(files), f"1 to {self.batch_size}", "that is the batch size of the pipeline")
        boxes, flip = np.ascontiguousarray(boxes), np.ascontiguousarray(flip)
        for name, given, dtype, shape in (
            ("boxes", torch.from_numpy(boxes), torch.int32, (len(files), 4)),
            ("flip", torch.from_numpy(flip), torch.bool, (len(files),)),
        ):
            check_dtype("dali", name, given, (dtype,), "each file has its own")
            check_shape("dali", name, given, shape, f"there are {len(files)} files")
        # DALI mirrors what is resized to a negative width
        self._line.feed(files, boxes, np.where(flip, -self.size, self.size).astype(np.float32))

    def collect(self) -> Crops:
        """The oldest batch fed and not yet collected. On the CPU `img` is DALI's memory, kept for as long as `img` is
        used, unless rows are missing; on a GPU it is ready for the current stream."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        output, batch = self._line.collect(stream)
        img = None if output is None else torch.from_dlpack(output.as_tensor())
        if img is None or len(batch.rows) < batch.size:
            whole = torch.empty(batch.size, 3, self.size, self.size, dtype=torch.uint8, device=self.device)
            if img is not None:
                rows = torch.tensor(batch.rows)
                if img.is_cuda:  # page-locked, so that the host does not wait
                    rows = rows.pin_memory().to(img.device, non_blocking=True)
                whole.index_copy_(0, rows, img)
            img = whole
        return Crops(img, batch.refused)

    def run(self, files: Sequence[bytes | None], boxes: np.ndarray, flip: np.ndarray) -> Crops:
        """`feed` and `collect`. Raises RuntimeError when other batches are still to be collected."""
        if self._line.waiting:
            raise RuntimeError(f"dali: {self._line.waiting} batches are fed, expected none because run() gives its own")
        self.feed(files, boxes, flip)
        return self.collect()

    def close(self) -> None:
        """End the pipeline and its threads; batches that were not collected are dropped. May be called twice."""
        self._line.close()


class DaliParts:
    """Parts of images, decoded on the CPU to the very pixels that `decode.decode` gives, for plain files.

    batch_size: most files of a call. threads: that decode. Not for several threads at once. Raises UserError when DALI
    is not there.
    """

    def __init__(self, batch_size: int, threads: int = 1) -> None:
        self.batch_size = batch_size

        def graph(dali: Any, file: Any, start: Any, shape: Any) -> Any:
            return dali.fn.decoders.image_slice(file, start, shape, axes=(0, 1), device="cpu", adjust_orientation=False)

        self._line = _Line(graph, False, batch_size, threads, None)

    def run(self, files: Sequence[bytes], boxes: np.ndarray, widths: np.ndarray) -> list[np.ndarray | None]:
        """files: plain ones, as `header.look` has it. boxes: int32 (n, 4), top, left, height, width. widths: of the
        images, integers (n,).
        Returns uint8 (height, width, 3) of each box, perhaps with gaps between its rows; None where DALI could not."""
        boxes = np.asarray(boxes, np.int32)
        wide = boxes.copy()
        wide[:, 3] = np.maximum(boxes[:, 3], np.minimum(widths, _LEAST_WIDTH))
        wide[:, 1] = np.minimum(boxes[:, 1], widths - wide[:, 3])
        self._line.feed(files, wide, None)
        output, batch = self._line.collect()
        parts: list[np.ndarray | None] = [None] * len(files)
        for k, row in enumerate(batch.rows):
            left, width = boxes[row, 1] - wide[row, 1], boxes[row, 3]
            parts[row] = np.asarray(output[k])[:, left : left + width]
        return parts

    def close(self) -> None:
        """End the pipeline and its threads. May be called twice."""
        self._line.close()


class _Batch(NamedTuple):
    """Rows of a batch of `size` that are in the pipeline.

    files, boxes int32 (n, 4), width: those of `rows`. width: float32 (n,) of the squares, negative ones mirror; None:
    parts of images are asked for. refused: row -> reason, other rows that had a file.
    """

    size: int
    rows: list[int]
    files: list[bytes]
    boxes: np.ndarray
    width: np.ndarray | None
    refused: dict[int, str]

    def without(self, places: Collection[int]) -> "_Batch":
        """Refuse the rows at these places of `rows`."""
        stay = [k for k in range(len(self.rows)) if k not in places]
        refused = self.refused | {self.rows[k]: _reason(self.files[k]) for k in places}
        rows, files = [self.rows[k] for k in stay], [self.files[k] for k in stay]
        width = None if self.width is None else self.width[stay]
        return _Batch(self.size, rows, files, self.boxes[stay], width, refused)

    def one(self, k: int) -> "_Batch":
        width = None if self.width is None else self.width[k : k + 1]
        return _Batch(1, [0], self.files[k : k + 1], self.boxes[k : k + 1], width, {})


class _Line:
    """A pipeline that is fed by hand, and built anew when a file has ended it.

    graph: DALI's module and the nodes of file, start, shape and, with `squares`, width -> the node of the result.
    """

    def __init__(
        self, graph: Callable[..., Any], squares: bool, batch_size: int, threads: int, device_id: int | None
    ) -> None:
        self._dali, self._most = _import(), _most_bytes()
        self._graph, self._device_id = graph, device_id
        self._batch_size, self._threads = batch_size, threads
        self._inputs = ("file", "start", "shape", "width") if squares else ("file", "start", "shape")
        self._fed: deque[_Batch] = deque()
        self._pipe: Any = self._build(batch_size, threads)  # None: a file has ended it

    @property
    def waiting(self) -> int:
        """Batches fed and not yet collected."""
        return len(self._fed)

    def feed(self, files: Sequence[bytes | None], boxes: np.ndarray, width: np.ndarray | None) -> None:
        if self.waiting >= _DEPTH:
            raise RuntimeError(f"dali: {self.waiting} batches are fed, expected one to be collected before the next")
        rows = [row for row, file in enumerate(files) if file is not None]
        there = [file for file in files if file is not None]
        batch = _Batch(len(files), rows, there, boxes[rows], None if width is None else width[rows], {})
        shut = [
            k for k, (file, box) in enumerate(zip(there, batch.boxes.tolist())) if not _opens(file, box, self._most)
        ]
        self._fed.append(batch.without(shut) if shut else batch)
        self._push(self._fed[-1])

    def collect(self, stream: Any = None) -> tuple[Any, _Batch]:
        """The results of the rows that the batch has in the end, as a list of DALI; None for no rows."""
        if not self._fed:
            raise RuntimeError("dali: no batch is fed, expected one to collect")
        batch = self._fed.popleft()
        output = self._pull(batch, stream)
        if self._pipe is None:
            output, batch = self._again(batch, stream)
            for later in self._fed:
                self._push(later)
        return output, batch

    def close(self) -> None:
        self._fed.clear()
        self._pipe = None

    def _push(self, batch: _Batch) -> None:
        if self._pipe is None or not batch.rows:
            return
        try:
            self._start(self._pipe, batch)
        except RuntimeError:
            self._pipe = None  # by a file of this batch or of one before it; `collect` finds out

    def _pull(self, batch: _Batch, stream: Any) -> Any:
        if self._pipe is None or not batch.rows:
            return None
        try:
            (output,) = self._pipe.share_outputs(stream)
            self._pipe.release_outputs()  # for the next batch: what `output` refers to lives as long as `output`
        except RuntimeError:
            self._pipe = None
            return None
        return output

    def _again(self, batch: _Batch, stream: Any) -> tuple[Any, _Batch]:
        """The same without the files that end a pipeline, from a new one."""
        batch = batch.without(self._guilty(batch))
        self._pipe = self._build(self._batch_size, self._threads)
        self._push(batch)
        output = self._pull(batch, stream)
        if self._pipe is None:  # files that pass alone and not together: never seen
            batch = batch.without(range(len(batch.rows)))
            self._pipe = self._build(self._batch_size, self._threads)
        return output, batch

    def _guilty(self, batch: _Batch) -> list[int]:
        """Places of the files that end a pipeline when they are alone in it."""
        guilty, pipe = [], None
        for k in range(len(batch.rows)):
            pipe = pipe or self._build(1, 1)
            try:
                self._start(pipe, batch.one(k))
                pipe.share_outputs()
                pipe.release_outputs()
            except RuntimeError:
                guilty.append(k)
                pipe = None
        return guilty

    def _build(self, batch_size: int, threads: int) -> Any:
        """A pipeline that has run as often as its depth, so that from here on each `schedule_run` is one batch."""
        dali = self._dali
        pipe = dali.Pipeline(batch_size, threads, self._device_id, prefetch_queue_depth=_DEPTH, exec_dynamic=True)
        with pipe:
            nodes = []
            for name in self._inputs:
                kind, ndim = _INPUTS[name]
                nodes.append(dali.fn.external_source(name=name, dtype=getattr(dali.types, kind), ndim=ndim))
            pipe.set_outputs(self._graph(dali, *nodes))
        pipe.build()
        for _ in range(_DEPTH):
            self._feed(pipe, _DOT)
        pipe.schedule_run()
        for _ in range(_DEPTH):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe

    def _start(self, pipe: Any, batch: _Batch) -> None:
        self._feed(pipe, batch)
        pipe.schedule_run()

    def _feed(self, pipe: Any, batch: _Batch) -> None:
        files = [np.frombuffer(file, np.uint8) for file in batch.files]
        start, shape = (np.ascontiguousarray(part) for part in np.split(batch.boxes, 2, 1))
        for name, data in zip(self._inputs, (files, start, shape, batch.width)):
            pipe.feed_input(name, data)


_INPUTS = {"file": ("UINT8", 1), "start": ("INT32", 1), "shape": ("INT32", 1), "width": ("FLOAT", 0)}
_DOT = _Batch(
    1, [0], [ppm(np.zeros((1, 1, 3), np.uint8))], np.array([[0, 0, 1, 1]], np.int32), np.ones(1, np.float32), {}
)


def _opens(file: bytes, box: list[int], most: int) -> bool:
    """DALI's parser takes the file, its image has `most` bytes at most, and the box is inside."""
    from nvidia import nvimgcodec

    top, left, height, width = box
    try:
        found = nvimgcodec.CodeStream(file)
        inside = 0 <= top <= top + height <= found.height and 0 <= left <= left + width <= found.width
        small = 3 * found.height * found.width <= most
        return inside and small and min(height, width) > 0 and found.codec_name in _CODECS
    except RuntimeError:
        return False


def _reason(file: bytes) -> str:
    """Why a file is refused, in the words of the portable decoder where it refuses it as well."""
    try:
        decode(file)
    except BadImage as error:
        return error.reason
    return "DALI cannot decode it"


def _import() -> Any:
    """nvidia.dali. Raises UserError."""
    # read when it is imported: its remarks about damaged files would go to the terminal
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
        import nvidia.nvimgcodec
    except ImportError as error:
        raise UserError(f"dali: it cannot be loaded ({error}), install it with {INSTALL} to decode with it") from None
    return nvidia.dali


def _most_bytes() -> int:
    """Of a decoded image: what DALI_MAX_IMAGE_SIZE says, which DALI up to 2.3 reads when it makes a decoder."""
    found = os.environ.setdefault("DALI_MAX_IMAGE_SIZE", str(3 * MAX_PIXELS))
    return int(found) if found.isdigit() else 3 * MAX_PIXELS


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        fail("dali", "device", f"'{name}'", "'cpu' or a CUDA device that torch can use", "DALI decodes on no other")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
