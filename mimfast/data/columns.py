"""Named numpy arrays in one file that is mapped into memory when read: the index of a store, and cached lists.

Every number is little-endian. Byte 0: the magic `MIMCOLS1`. 8: uint64, the length J of the header. 16: uint32, CRC-32C
of the header. 20: four zero bytes. 24: the header, J bytes of JSON: {"meta": {...}, "columns": {name: {"dtype": ...,
"count": ..., "at": ..., "crc32c": ...}}}. The data begin at the next multiple of 64; `at` counts bytes from there and
is itself a multiple of 64; gaps are zero.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mimfast.data.crc32c import crc32c

MAGIC = b"MIMCOLS1"
_FIRST = 24
_DTYPES = ("|u1", "<u2", "<i2", "<i4", "<u4", "<i8")

Columns = dict[str, np.ndarray]
Content = tuple[dict[str, Any], Columns]


class Damaged(ValueError):
    """The file is not one of these, or is cut short; the text says which, without the name of the file."""


def save(file: BinaryIO, meta: dict[str, Any], columns: Columns) -> None:
    """Write at the present position, which must be 0. meta: anything JSON knows. columns: one-dimensional arrays."""
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    entries: dict[str, dict[str, Any]] = {}
    at = 0
    for name, array in arrays.items():
        entries[name] = {"dtype": array.dtype.str, "count": array.size, "at": at, "crc32c": crc32c(array)}
        at = _align(at + array.nbytes)
    header = json.dumps({"meta": meta, "columns": entries}, sort_keys=True).encode()
    file.write(MAGIC + len(header).to_bytes(8, "little") + crc32c(header).to_bytes(4, "little") + bytes(4) + header)
    first = _align(_FIRST + len(header))
    for name, array in arrays.items():
        file.write(bytes(first + entries[name]["at"] - file.tell()))
        file.write(array.view(np.uint8).data)


def load(path: str | os.PathLike[str]) -> Content:
    """(meta, columns mapped into memory). Raises OSError, or Damaged; the columns' checksums are left to `damaged`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        meta, entries = _read_header(file, size)
    blob = np.memmap(path, np.uint8, "r").view(np.ndarray)  # slicing a memmap object is slow; a plain view stays mapped
    columns = {}
    for name, entry in entries.items():
        dtype, count, at = np.dtype(entry["dtype"]), entry["count"], entry["at"]
        if at + count * dtype.itemsize > size:
            raise Damaged(f"it has {size} bytes, expected {at + count * dtype.itemsize} or more: it is cut short")
        columns[name] = blob[at : at + count * dtype.itemsize].view(dtype)
    return meta, columns


def damaged(path: str | os.PathLike[str]) -> list[str]:
    """Names of the columns whose checksum does not fit. Raises as `load` does."""
    _, columns = load(path)
    with open(path, "rb") as file:
        _, entries = _read_header(file, os.fstat(file.fileno()).st_size)
    return [name for name, column in columns.items() if crc32c(column) != entries[name]["crc32c"]]


def cached(path: Path, stamp: str, build: Callable[[], Content]) -> Content:
    """What `build` gives, from `path` when that was written under the same stamp; a cache that cannot be read or
    written only costs the building."""
    try:
        meta, columns = load(path)
        if meta.get("stamp") == stamp:
            return meta, columns
    except (OSError, Damaged):
        pass
    meta, columns = build()
    meta["stamp"] = stamp
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file, meta, columns)
        os.replace(temporary, path)
        return load(path)
    except (OSError, Damaged):
        with contextlib.suppress(OSError):
            temporary.unlink()
        return meta, columns


def _align(at: int) -> int:
    return -(-at // 64) * 64


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(meta, columns), with the place of a column counted from the start of the file."""
    first = file.read(_FIRST)
    if first[:8] != MAGIC:
        raise Damaged(f"it begins with {first[:8]!r}, expected {MAGIC!r}")
    length = int.from_bytes(first[8:16], "little")
    if len(first) < _FIRST or _FIRST + length > size:
        raise Damaged(f"it has {size} bytes, expected {_FIRST + length} or more: it is cut short")
    header = file.read(length)
    if crc32c(header) != int.from_bytes(first[16:20], "little"):
        raise Damaged("the checksum of its header does not fit")
    try:
        content = json.loads(header)
        meta, entries = content["meta"], content["columns"]
        for entry in entries.values():
            if entry["dtype"] not in _DTYPES or min(entry["at"], entry["count"]) < 0 or entry["at"] % 64:
                raise Damaged(f"a column is described as {entry}")
            entry["at"] += _align(_FIRST + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its header is not as expected ({error})") from None
    return meta, entries
