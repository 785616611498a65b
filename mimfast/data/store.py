"""The mimfast store: images at training size in one file, with an index and a checksum for each. docs/data.md has it
byte by byte; `mimfast prep` (prep.py) writes it.

A store is a folder of two files. `data.mim` holds the records, one after the other: JPEG files, or the pixels of RGB
images. `index.mim` (columns.py) holds their places, sizes, checksums, names and labels. Both are mapped into memory, so
that opening costs nothing and processes share the pages.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from mimfast._check import UserError
from mimfast.data import columns as _columns
from mimfast.data.crc32c import crc32c, is_fast
from mimfast.data.decode import reduced_shapes
from mimfast.data.paths import STORE_INDEX, kind_of
from mimfast.data.pixels import ppm

FORMAT = "mimfast store"
VERSION = 1
DATA = "data.mim"
BAD = "bad.jsonl"
DATA_MAGIC = b"MIMDATA1"
ALIGN = 64  # records begin at multiples of this; so does the first, after the header of the data file

# name -> dtype, one entry an image, except for the two that hold the names
COLUMNS = {
    "offset": "<i8",
    "size": "<i8",
    "crc32c": "<u4",
    "height": "<i4",
    "width": "<i4",
    "label": "<i4",
    "name_ends": "<i8",
    "names": "|u1",
}


class Store:
    """The images of a store, as a `Source`. Safe to use from many threads, and cheap to send to other processes.

    Public besides the members of `Source`: `meta` (the header), `data` (the records, uint8, memory-mapped), and the
    arrays `offsets`, `sizes` int64 (N,), `heights`, `widths`, `labels` int32 (N,), -1 for no label.

    A record is held against its checksum when it is first read, and a damaged one raises OSError with its place.
    Without the native core this would be slow and is left to `mimfast prep verify`.

    path: the folder. Raises UserError when it is missing, of another version, unfinished, damaged or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta, columns = read_index(self.path)
        self.offsets, self.sizes, self._crc = columns["offset"], columns["size"], columns["crc32c"]
        self.heights, self.widths, self.labels = columns["height"], columns["width"], columns["label"]
        self._name_ends, self._names = columns["name_ends"], columns["names"]
        self.held_out = tuple(self.meta["held_out"])
        self.is_raw: bool = self.meta["records"] == "raw"
        self._file = _open_data(self.path, self.meta)
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, np.uint8)
        self._checked = np.full(len(self), not is_fast())

    @property
    def classes(self) -> list[str] | None:
        """As in the source the store was made from."""
        return self.meta["classes"]

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, i: int) -> str:
        """As in the source."""
        first, last = self._name_ends[i : i + 2].tolist()
        return self._names[first:last].tobytes().decode("utf-8", "surrogateescape")

    def label(self, i: int) -> int | None:
        label = int(self.labels[i])
        return None if label < 0 else label

    def read(self, i: int) -> bytes:
        """Image i as a file: JPEG, or PPM from a raw store. Raises OSError when the record is damaged."""
        if self.is_raw:
            return ppm(self.record(i).reshape(int(self.heights[i]), int(self.widths[i]), 3))
        offset, size = int(self.offsets[i]), int(self.sizes[i])
        # not through the map: other threads go on while the disk is waited for, and an error of the disk is an OSError
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise OSError(f"the data end before byte {offset + size}")
        self._check(i, np.frombuffer(data, np.uint8))
        return data

    def record(self, i: int) -> np.ndarray:
        """uint8 (n,), a read-only view of the mapped file: the bytes of a JPEG file, or pixels in order (row, column,
        channel). Raises OSError when the record is damaged."""
        offset, size = int(self.offsets[i]), int(self.sizes[i])
        view = self.data[offset : offset + size]
        self._check(i, view)
        return view

    def pixels(self, i: int) -> np.ndarray | None:
        """uint8 (H, W, 3), a read-only view of the mapped file; None in a store of JPEG records. Raises OSError."""
        return self.record(i).reshape(int(self.heights[i]), int(self.widths[i]), 3) if self.is_raw else None

    def shapes(self, min_side: int | None = None) -> np.ndarray:
        """int32 (N, 2), height and width of every image, those of JPEG records as decoded with `min_side`."""
        shapes = np.stack([self.heights, self.widths], 1)
        return shapes if self.is_raw else reduced_shapes(shapes, min_side)

    def will_need(self, ids: np.ndarray) -> None:
        """Ask the system to read these records from disk now, without waiting for them. ids: int64 (n,)."""
        for offset, size in zip(self.offsets[ids].tolist(), self.sizes[ids].tolist()):
            first = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, offset + size - first)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.path,)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _check(self, i: int, data: np.ndarray) -> None:
        if self._checked[i]:
            return
        found, wanted = crc32c(data), int(self._crc[i])
        if found != wanted:
            raise OSError(damage(i, int(self.offsets[i]), len(data), found, wanted))
        self._checked[i] = True


def damage(i: int, offset: int, size: int, found: int, wanted: int) -> str:
    """What messages say about a record whose checksum does not fit."""
    return (
        f"record {i} (bytes {offset} to {offset + size - 1} of {DATA}) has CRC-32C {found:08x}, expected {wanted:08x}"
    )


def data_header(key: bytes) -> bytes:
    """The first 64 bytes of the data file. key: 16 bytes that the index repeats, so that the two belong together."""
    return (DATA_MAGIC + key).ljust(ALIGN, b"\0")


def read_index(path: Path) -> tuple[dict[str, Any], _columns.Columns]:
    """(meta, columns) of the store in a folder. Raises UserError."""
    if not (path / STORE_INDEX).is_file():
        kind_of(os.fspath(path))  # names what else is wrong with it
        raise UserError(f"store: '{path}' has no {STORE_INDEX}, expected a folder that mimfast prep has written")
    try:
        meta, columns = _columns.load(path / STORE_INDEX)
    except OSError as error:
        raise UserError(f"store: '{path / STORE_INDEX}' cannot be read ({error.strerror}), expected a store") from None
    except _columns.Damaged as error:
        raise UserError(f"store: '{path / STORE_INDEX}' is damaged: {error}; make it again from its images") from None
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise UserError(
            f"store: '{path}' has version {meta.get('version')}, expected {VERSION} because this mimfast reads no "
            "other: make it again with mimfast prep, or install the mimfast that wrote it"
        )
    n = meta["images"]
    for name, dtype in COLUMNS.items():
        wanted = {"name_ends": n + 1, "names": None}.get(name, n)
        if name not in columns or columns[name].dtype.str != dtype or wanted not in (None, len(columns[name])):
            raise UserError(f"store: '{path / STORE_INDEX}' is damaged: its column {name} is not as the header says")
    return meta, columns


def _open_data(path: Path, meta: dict[str, Any]) -> int:
    """A file descriptor. Raises UserError."""
    place = path / DATA
    try:
        file = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"store: '{place}' cannot be read ({error.strerror}), expected the records of the store"
        ) from None
    size, header = os.fstat(file).st_size, os.pread(file, ALIGN, 0)
    if size >= ALIGN and header != data_header(bytes.fromhex(meta["key"])):
        os.close(file)
        raise UserError(
            f"store: '{place}' is the data of another store, expected the one {STORE_INDEX} was written with"
        )
    if size != meta["data_bytes"]:
        os.close(file)
        raise UserError(
            f"store: '{place}' has {size} bytes, expected {meta['data_bytes']}: it was cut short or added to; "
            "mimfast prep verify names the records that are lost"
        )
    return file
