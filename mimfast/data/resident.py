"""Pixels of a source that stay in memory from the first epoch on, so that later ones neither read nor decode.

All images lie in one flat buffer, in the memory of the machine or of a GPU, each (height, width, 3) without gaps. Where
each one lies follows from sizes that are known before anything is read: from the source, or because every image is kept
as a copy of one size. The buffer fills while the first epoch runs, and crops come out of it by ops.crop_resize.

A copy is the whole image squeezed to a square of S x S pixels, so a store of N images takes 3 S^2 N bytes. A box of the
original is mapped onto the copy and rounded to whole pixels; its edges are off by half a pixel of the copy at most. The
copy changes what a crop looks like, so crops come out of it in the first epoch too, and where nothing is kept.
n images, S side of a copy in pixels.
"""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimfast._check import UserError, fail
from mimfast.data.crop import crop_rows
from mimfast.data.memory import Memory, gpu_memory, host_memory
from mimfast.data.sources import Source, shapes_of
from mimfast.ops._choice import why_not_on
from mimfast.ops.crop_resize import MAX_SIDE, Filter, crop_resize

Cache = Literal["none", "host", "gpu"]
_SLOTS, _SLOT_BYTES = 32, 64 << 20  # images on their way to a GPU, at most, and the bytes of all of them
_SIDE_STEP = 16


class Kept(NamedTuple):
    """What crops of an image come out of. pixels: uint8 (h, w, 3), None where only the GPU has them; width and height
    of the original, which crop boxes refer to; top and left, where `pixels` begin in it when they are a part."""

    pixels: np.ndarray | None
    width: int
    height: int
    top: int = 0
    left: int = 0


class Plan(NamedTuple):
    """What a cache takes and what there is. images: N. least, most: bytes of the smallest and the largest image.
    need: bytes in all. processes: how many of this machine keep a cache of their own. memory: what is free.
    """

    images: int
    least: int
    most: int
    need: int
    processes: int
    memory: Memory

    @property
    def fits(self) -> bool:
        return self.need <= self.memory.usable

    @property
    def sentence(self) -> str:
        """One line for the start of a run, without a full stop."""
        return f"cache: {self.reckoning}: {'fits' if self.fits else 'does not fit'}"

    @property
    def reckoning(self) -> str:
        each = f"{_grouped(self.most)} B"
        if self.least != self.most:
            each = f"{_grouped(self.least)} to {_grouped(self.most)} B"
        ranks = f" in {self.processes} processes" if self.processes > 1 else ""
        memory = self.memory
        return (
            f"{_grouped(self.images)} images{' of' if self.least != self.most else ' x'} {each}{ranks} = "
            f"{_amount(self.need)}, {_amount(memory.free)} free {memory.place}, of which {_amount(memory.room)} stay "
            f"free for {memory.what_for}"
        )


def plan(
    source: Source, memory: Memory, side: int | None = None, min_side: int | None = None, processes: int = 1
) -> Plan:
    """What a cache of `source` takes in `memory` (of `memory.host_memory` or `memory.gpu_memory`).

    side: S of the copies; None: images as they are, those of JPEG files as `decode.decode` gives them for `min_side`.
    processes: how many of this machine share that memory, each with a cache of its own.
    Raises UserError when the sizes of the images are not known before they are read.
    """
    if side is not None:
        each = 3 * side * side
        return Plan(len(source), each, each, len(source) * each * processes, processes, memory)
    sizes = 3 * _shapes(source, min_side).astype(np.int64).prod(1)
    return Plan(len(sizes), int(sizes.min()), int(sizes.max()), int(sizes.sum()) * processes, processes, memory)


def check_plan(wanted: Plan, cache: Cache, side: int | None, host: Memory | None) -> None:
    """Raise UserError, which says what would fit, when a plan for `cache` and `side` does not. host: the memory of the
    machine, where the cache could be instead."""
    if wanted.fits:
        return
    others = ["'none'"]
    if cache == "gpu" and host is not None and wanted._replace(memory=host).fits:
        others.append("'host'")
    largest = int((wanted.memory.usable / (3 * wanted.images * wanted.processes)) ** 0.5) // _SIDE_STEP * _SIDE_STEP
    if largest >= _SIDE_STEP and (side is None or largest < side):
        others.append(f"data.cache_side {largest}")
    fail("pretrain", "data.cache", repr(cache), " or ".join(others), wanted.reckoning)


def open_resident(
    source: Source, cache: Cache, side: int | None, min_side: int | None, device: torch.device, processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> "Resident | None":  # fmt: skip
    """The cache that a run asks for, with its plan, once that is known to fit; None without cache and copies.

    device: where the run trains. processes: how many of it share this machine. wait: returns when all of them have
    seen how much is free. min_side: as of `Resident`.
    Raises UserError: it does not fit, the sizes of the images are not known, or there is no GPU to keep them.
    """
    if cache == "none":
        return None if side is None else Resident(source, None, side)
    if cache == "gpu" and device.type != "cuda":
        fail("pretrain", "data.cache", "'gpu'", "'none' or 'host'", f"the run is on {device.type}")
    host = host_memory()
    wanted = plan(source, gpu_memory(device), side, min_side) if cache == "gpu" else None
    wanted = plan(source, host, side, min_side, processes) if wanted is None else wanted
    check_plan(wanted, cache, side, host)
    wait()
    resident = Resident(source, device if cache == "gpu" else "cpu", side, min_side, pin=device.type == "cuda")
    resident.plan = wanted
    return resident


class Resident:
    """Images of a source in one buffer. `put` and `has` may be called from many threads, `has` takes no lock.

    Attributes: `buffer` uint8 (nbytes,), `nbytes`, `count` of the images that are there, `side`, `min_side`, `device`,
    `on_device`: crops can only be made by `crop`, for `get` has no pixels; `plan` of `open_resident`.

    source: what the images come from; ids are its ids. device: of the buffer; None keeps nothing and only makes copies.
    side: S of the copies; None: images as they are. min_side: that of the decoder (`decode.decode`), where there are no
    copies. staged: fill the buffer by way of page-locked memory and a stream; None: where it is on a GPU. pin: have a
    buffer of the host page-locked, when the system allows it: never swapped out, and within reach of a GPU.

    On a GPU crops are made by the CUDA kernel, whether or not it is verified.

    Raises UserError: `side` out of range, sizes that are not known, memory that cannot be had, or a GPU without the
    kernel.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device | str | None,
        side: int | None = None,
        min_side: int | None = None,
        staged: bool | None = None,
        pin: bool = False,
    ) -> None:
        if side is not None and not 1 <= side <= MAX_SIDE:
            fail("cache", "side", side, f"1 to {MAX_SIDE}", "it is the side of a copy in pixels")
        self.side, self._source = side, source
        self.min_side = min_side if side is None else side
        self.device = None if device is None else torch.device(device)
        self.plan: Plan | None = None
        self._impl: Any = "auto"
        self.on_device = False
        if self.device is None:
            return
        if self.device.type == "cuda":
            reason = why_not_on("cuda", "cuda") if torch.cuda.is_available() else "torch sees no GPU here"
            self._impl = "cuda"
            if reason is not None:
                fail("cache", "device", str(device), "'cpu'", reason)
        self._lay_out()
        self.buffer = _allocate(self.nbytes, self.device, pin)
        # has(i) is set after the pixels of i are there, and never unset
        self._there = np.zeros(len(source), bool)
        self.on_device = self.device.type != "cpu" if staged is None else staged
        self._host = None if self.on_device else self.buffer.numpy()
        self._staging = _Staging(self.buffer, self._largest) if self.on_device else None

    def _lay_out(self) -> None:
        n = len(self._source)
        if self.side is None:
            self._shapes = np.ascontiguousarray(_shapes(self._source, self.min_side))
            self._originals = self._shapes
        else:
            self._shapes = np.broadcast_to(np.array(self.side, np.int32), (n, 2))
            self._originals = np.zeros((n, 2), np.int32)
        sizes = 3 * self._shapes.astype(np.int64).prod(1)
        ends = sizes.cumsum()
        self._offsets, self.nbytes, self._largest = ends - sizes, int(ends[-1]), int(sizes.max())

    def has(self, i: int) -> bool:
        """Whether image i is there."""
        return self.device is not None and bool(self._there[i])

    @property
    def count(self) -> int:
        """How many images are there."""
        return 0 if self.device is None else int(self._there.sum())

    def sizes(self, i: int) -> tuple[int, int]:
        """(width, height) of the original of an image that is there."""
        height, width = self._originals[i].tolist()
        return width, height

    def usable(self, min_side: int | None) -> np.ndarray | None:
        """bool (N,): which images would be the same with this `min_side` of the decoder; None: all of them.

        A run whose crops change their size may decode a JPEG at another one from some stage on.
        """
        if self.device is None or self.side is not None or min_side == self.min_side:
            return None
        same = (_shapes(self._source, min_side) == self._shapes).all(1)
        return None if same.all() else same

    def get(self, i: int) -> Kept | None:
        """Image i, a view; None when it is not there."""
        if not self.has(i):
            return None
        width, height = self.sizes(i)
        return Kept(None if self._host is None else self._view(i), width, height)

    def put(self, i: int, pixels: np.ndarray) -> Kept:
        """Keep image i, uint8 (H, W, 3); what its crops come out of, also where it is not kept: no memory was set
        aside, or not for an image of this size."""
        height, width = pixels.shape[:2]
        if self.side is not None:
            pixels = square_copy(pixels, self.side)
        if self.device is None or self._there[i] or pixels.shape[:2] != tuple(self._shapes[i].tolist()):
            return Kept(pixels, width, height)
        if self._staging is None:
            self._view(i)[...] = pixels
        else:
            self._staging.copy(pixels, int(self._offsets[i]))
        if self.side is not None:
            self._originals[i] = height, width
        self._there[i] = True
        return Kept(pixels, width, height)

    def place(self, boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Boxes of originals, int32 (n, 4) top, left, height, width, on what is kept of them. widths, heights: (n,) of
        the originals."""
        return boxes if self.side is None else square_boxes(boxes, widths, heights, self.side)

    def crop(
        self, ids: np.ndarray, boxes: np.ndarray, flip: np.ndarray, size: int, filter: Filter, out: Tensor | None = None
    ) -> Tensor:
        """Crops of images that are there, on the device of the buffer and its current stream; the host does not wait.

        ids: int64 (n,). boxes: int32 (n, 4), top, left, height, width in pixels of the originals. flip: bool (n,).
        size: side of the crops in pixels. out: uint8 (n, 3, size, size) to be filled, on the device.
        """
        if self.device is None or not self._there[ids].all():
            fail("cache", "ids", "an image that was never put", "images that are there", "nothing is read here")
        originals = self._originals[ids]
        boxes = self.place(boxes, originals[:, 1], originals[:, 0])
        if self._staging is not None:
            self._staging.join()
        offsets, boxes_t, shapes, flip_t = self.move(self._offsets[ids], boxes, self._shapes[ids], flip)
        return crop_resize(
            self.buffer, boxes_t, flip_t, size, filter=filter, offsets=offsets, shapes=shapes, out=out, impl=self._impl
        )

    def move(self, *arrays: np.ndarray) -> list[Tensor]:
        """Small arrays on the device, by one copy that the host does not wait for. Those of long numbers first."""
        assert self.device is not None
        flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
        sizes = [len(part) for part in flat]
        packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.concatenate(flat, out=packed.numpy())
        parts = packed.to(self.device, non_blocking=True).split(sizes)
        return [part.view(torch.from_numpy(array).dtype).view(array.shape) for part, array in zip(parts, arrays)]

    def _view(self, i: int) -> np.ndarray:
        assert self._host is not None
        at, (height, width) = int(self._offsets[i]), self._shapes[i].tolist()
        return self._host[at : at + 3 * height * width].reshape(height, width, 3)


class _Staging:
    """Takes images from many threads into a buffer by a stream of its own, through a few slots of page-locked memory.

    A thread waits for a slot whose last copy is under way; the stream that trains never waits for the host.
    """

    def __init__(self, buffer: Tensor, largest: int) -> None:
        self._buffer, self._lock = buffer, threading.Lock()
        self._stream = torch.cuda.Stream(buffer.device) if buffer.is_cuda else None
        if self._stream is not None:  # the memory of the buffer may still be in use by what had it before
            self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        self._free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        slots = max(2, min(_SLOTS, _SLOT_BYTES // largest))
        for slot in torch.empty(slots, largest, dtype=torch.uint8, pin_memory=buffer.is_cuda):
            self._free.put((slot, torch.cuda.Event(blocking=True) if buffer.is_cuda else None))

    def copy(self, pixels: np.ndarray, at: int) -> None:
        """Bytes of `pixels` to byte `at` of the buffer, for everything that comes after a `join`."""
        slot, event = self._free.get()
        try:
            if event is not None:
                event.synchronize()
            part = slot[: pixels.nbytes]
            part.numpy().reshape(pixels.shape)[...] = pixels
            there = self._buffer[at : at + pixels.nbytes]
            if event is None:
                there.copy_(part)
                return
            with torch.cuda.stream(self._stream):
                there.copy_(part, non_blocking=True)
                event.record(self._stream)
        finally:
            self._free.put((slot, event))

    def join(self) -> None:
        """Let the current stream wait for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._buffer.device).wait_stream(self._stream)


def square_copy(pixels: np.ndarray, side: int) -> np.ndarray:
    """The whole image, uint8 (H, W, 3), squeezed to uint8 (side, side, 3) by bicubic ops.crop_resize."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    planes = np.empty((1, 3, side, side), np.uint8)
    crop_rows([pixels], np.array([[0, 0, height, width]], np.int32), np.zeros(1, bool), "bicubic", planes)
    return np.ascontiguousarray(planes[0].transpose(1, 2, 0))


def square_boxes(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, side: int) -> np.ndarray:
    """Boxes of originals on their square copies: edges rounded to whole pixels, at least one pixel each way.

    boxes: int32 (n, 4), top, left, height, width. widths, heights: (n,) of the originals. Returns int32 (n, 4).
    """
    top, left, tall, wide = boxes.astype(np.int64).T

    def edges(first: np.ndarray, length: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = whole.astype(np.int64)
        # halves up, in whole numbers: the same on every machine
        begin = np.minimum((2 * first * side + whole) // (2 * whole), side - 1)
        end = (2 * (first + length) * side + whole) // (2 * whole)
        return begin, np.maximum(end - begin, 1)

    (top, tall), (left, wide) = edges(top, tall, heights), edges(left, wide, widths)
    return np.stack([top, left, tall, wide], 1).astype(np.int32)


def _shapes(source: Source, min_side: int | None) -> np.ndarray:
    """int32 (N, 2). Raises UserError when the source does not know the sizes of its images."""
    shapes = shapes_of(source, min_side)
    if shapes is None:
        raise UserError(
            "cache: data.path has images whose sizes are not known before they are read, expected data.cache_side "
            "(every image is then kept as a square copy of that side) or a store made by mimfast prep because memory "
            "is set aside for all of them at the start"
        )
    return shapes


def _allocate(nbytes: int, device: torch.device, pin: bool) -> Tensor:
    """uint8 (nbytes,). Raises UserError."""
    try:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch's own out-of-memory errors are among these
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cache: {device} has no {_amount(nbytes)} in one piece, expected a smaller data.cache_side ({reason})"
        ) from None
    if device.type == "cpu" and pin:
        # torch's own page-locked memory comes in powers of two: up to twice the bytes
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        else:
            with contextlib.suppress(RuntimeError):  # the next launch would be blamed for what was refused here
                torch.zeros(1, device="cuda")
    return buffer


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _amount(nbytes: int) -> str:
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if nbytes >= pair[1]), ("kB", 1e3))
    return f"{nbytes / size:.1f} {unit}"
