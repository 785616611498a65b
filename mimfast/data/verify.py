"""Hold a store against its checksums."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mimfast.data import columns as _columns
from mimfast.data.cpu import default_workers
from mimfast.data.crc32c import crc32c
from mimfast.data.paths import STORE_INDEX
from mimfast.data.store import ALIGN, DATA, damage, data_header, read_index

_RUN = 64  # records a thread takes at a time


def verify(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> list[str]:
    """What is wrong with a store, a sentence each; empty when every byte is as it was written.

    progress: called with (records done, records in all). Raises UserError when the index cannot be read at all.
    """
    path = Path(path)
    meta, columns = read_index(path)
    problems = [
        f"{STORE_INDEX}: the checksum of column {name} does not fit" for name in _columns.damaged(path / STORE_INDEX)
    ]
    try:
        file = os.open(path / DATA, os.O_RDONLY)
    except OSError as error:
        return [*problems, f"{DATA} cannot be read ({error.strerror})"]
    try:
        size = os.fstat(file).st_size
        if os.pread(file, ALIGN, 0) != data_header(bytes.fromhex(meta["key"]))[:size]:
            problems.append(f"{DATA}: its header is damaged, or it belongs to another store")
        if size != meta["data_bytes"]:
            problems.append(f"{DATA} has {size} bytes, expected {meta['data_bytes']}")
        return problems + _records(file, columns, progress)
    finally:
        os.close(file)


def _records(file: int, columns: _columns.Columns, progress: Callable[[int, int], None] | None) -> list[str]:
    n = len(columns["offset"])

    def check(first: int) -> list[str]:
        return [text for i in range(first, min(first + _RUN, n)) if (text := _record(file, columns, i))]

    problems = []
    with ThreadPoolExecutor(default_workers(), "mimfast-verify") as pool:
        for done, found in enumerate(pool.map(check, range(0, n, _RUN)), 1):
            problems += found
            if progress is not None:
                progress(min(done * _RUN, n), n)
    return problems


def _record(file: int, columns: _columns.Columns, i: int) -> str | None:
    offset, size, wanted = (int(columns[name][i]) for name in ("offset", "size", "crc32c"))
    first, last = columns["name_ends"][i : i + 2].tolist()
    name = columns["names"][first:last].tobytes().decode("utf-8", "backslashreplace")
    try:
        data = os.pread(file, size, offset)
    except (OSError, ValueError, OverflowError) as error:
        return f"record {i} (bytes {offset} to {offset + size - 1} of {DATA}) cannot be read ({error}): '{name}'"
    if len(data) < size:
        return (
            f"record {i} (bytes {offset} to {offset + size - 1} of {DATA}) is cut off after {len(data)} bytes: '{name}'"
        )
    found = crc32c(np.frombuffer(data, np.uint8))
    return None if found == wanted else f"{damage(i, offset, size, found, wanted)}: '{name}'"
