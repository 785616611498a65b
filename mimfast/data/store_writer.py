"""Writes a store so that it can be killed at any moment and continued, with the same bytes in the end.

Records are appended to the data file in the order of the source. Every few seconds it is flushed to the disk and then
one line for each chunk is appended to the journal: `<CRC-32C of the rest, 8 hex digits> <JSON>`. A writer that starts
again believes the journal up to the first line that is torn, cuts off the data it does not vouch for, and goes on. At
the end the index is written beside, flushed and renamed, which is what makes it a store; then the journal goes.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimfast._check import UserError
from mimfast.data import columns as _columns
from mimfast.data.crc32c import crc32c
from mimfast.data.paths import STORE_INDEX, STORE_JOURNAL
from mimfast.data.sources import Source
from mimfast.data.store import ALIGN, BAD, COLUMNS, DATA, data_header

_COMMIT_SECONDS = 5.0
_COMMIT_BYTES = 256 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Record(NamedTuple):
    """What became of an image of the source: the bytes to keep, or, when `data` is None, why it is bad."""

    sample_id: int
    data: bytes | None
    height: int = 0
    width: int = 0
    crc32c: int = 0
    reason: str = ""


class Writer:
    """A context manager around the folder of a store that is being written.

    path: the folder, made when missing. job: what decides the bytes of the store, all of it JSON; a store begun for
    another job is refused. Raises UserError when the folder holds something else or cannot be written, or when another
    process writes there.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self.job = path, job
        self.done = 0  # images of the source that were dealt with
        self.end = ALIGN  # bytes of the data file
        self.bad: list[tuple[int, str]] = []
        self._kept = {name: array(code) for name, code in zip(("id", *_RECORD), "qqqIii")}
        self._lines: list[bytes] = []
        self._committed, self._last = ALIGN, time.monotonic()
        key = crc32c(_line(job)).to_bytes(4, "little") + bytes.fromhex(job["digest"])[:12]
        self._key = key
        self._journal = self._data = -1
        try:
            with self._writing():
                _check_folder(path)
                path.mkdir(parents=True, exist_ok=True)
                self._journal = os.open(path / STORE_JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
                self._lock()
                self._data = os.open(path / DATA, os.O_RDWR | os.O_CREAT, 0o644)
                self._replay()
        except UserError:
            self._close()
            raise

    @property
    def images(self) -> int:
        return len(self._kept["id"])

    def append(self, records: list[Record]) -> None:
        """The next images of the source, in its order. Committed by and by."""
        entry: dict[str, list] = {"kept": [], "bad": []}
        parts = []
        for record in records:
            if record.data is None:
                entry["bad"].append([record.sample_id, record.reason])
                continue
            parts += [record.data, bytes(-len(record.data) % ALIGN)]
            entry["kept"].append([record.sample_id, len(record.data), record.crc32c, record.height, record.width])
        entry["done"] = self.done + len(records)  # type: ignore[assignment]
        with self._writing():
            try:
                _write_all(self._data, b"".join(parts))
            except OSError:
                self._keep_what_is_whole()
                raise
        self._take(entry)
        self._lines.append(_line(entry))
        late = time.monotonic() - self._last > _COMMIT_SECONDS
        if late or self.end - self._committed > _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Make what was appended survive a crash."""
        with self._writing():
            os.fsync(self._data)
            _write_all(self._journal, b"".join(self._lines))
            os.fsync(self._journal)
        self._lines.clear()
        self._committed, self._last = self.end, time.monotonic()

    def _keep_what_is_whole(self) -> None:
        """On a full disk: give the room of the record that did not fit to the journal."""
        with contextlib.suppress(OSError, UserError):
            os.ftruncate(self._data, self.end)
            self.commit()

    def finish(self, source: Source, meta: dict[str, Any]) -> dict[str, Any]:
        """Turn it into a store; returns its header. source: gives names and labels."""
        self.commit()
        ids = self._kept["id"]
        meta = {**meta, "images": len(ids), "bad": len(self.bad), "data_bytes": self.end, "key": self._key.hex()}
        bad = b"".join(
            json.dumps({"name": source.name(i), "reason": reason}).encode() + b"\n" for i, reason in self.bad
        )
        with self._writing():
            if bad:
                _replace(self.path / BAD, lambda file: file.write(bad))
            columns = self._columns(source)
            _replace(self.path / STORE_INDEX, lambda file: _columns.save(file, meta, columns))
            os.unlink(self.path / STORE_JOURNAL)
        return meta

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            with contextlib.suppress(UserError):
                self.commit()
        self._close()

    def _close(self) -> None:
        for file in (self._data, self._journal):  # the journal carries the lock
            if file >= 0:
                os.close(file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"prep: '{self.path}' is being written by another process, expected a folder of its own"
            ) from None

    def _replay(self) -> None:
        """Take up where the journal ends; without a journal begin it."""
        with open(self.path / STORE_JOURNAL, "rb") as file:
            entries = list(_entries(file.read()))
        size = os.fstat(self._data).st_size
        whole = 0
        if entries:
            _check_job(self.path, self.job, entries[0][0])
            whole = entries[0][1]
        for entry, length in entries[1:]:
            if self._end_with(entry) > size:
                break
            self._take(entry)
            whole += length
        os.ftruncate(self._journal, whole)
        os.lseek(self._journal, 0, os.SEEK_END)
        os.ftruncate(self._data, self.end if entries else 0)
        if not entries:
            _write_all(self._data, data_header(self._key))
            os.fsync(self._data)
            _write_all(self._journal, _line(self.job))
            os.fsync(self._journal)
            _sync_folder(self.path)
        os.lseek(self._data, 0, os.SEEK_END)
        self._committed = self.end

    def _take(self, entry: dict[str, Any]) -> None:
        for record in entry["kept"]:
            for name, value in zip(("id", *_RECORD), (record[0], self.end, *record[1:])):
                self._kept[name].append(value)
            self.end += _padded(record[1])
        self.bad += [(i, reason) for i, reason in entry["bad"]]
        self.done = entry["done"]

    def _end_with(self, entry: dict[str, Any]) -> int:
        return self.end + sum(_padded(record[1]) for record in entry["kept"])

    def _columns(self, source: Source) -> _columns.Columns:
        names, ends, labels = bytearray(), array("q", [0]), array("i")
        for i in self._kept["id"]:
            names += source.name(i).encode("utf-8", "surrogateescape")
            ends.append(len(names))
            label = source.label(i)
            labels.append(-1 if label is None else label)
        every: dict[str, bytearray | array] = {
            **{name: self._kept[name] for name in _RECORD},
            "label": labels,
            "name_ends": ends,
            "names": names,
        }
        return {name: np.frombuffer(every[name], np.dtype(dtype)) for name, dtype in COLUMNS.items()}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the file system into one sentence."""
        try:
            yield
        except OSError as error:
            count, total = self.done, self.job["count"]
            if error.errno not in _FULL:
                raise UserError(
                    f"prep: '{self.path}' cannot be written ({error.strerror}) after {count} of {total} images, "
                    "expected a folder this user may write to"
                ) from None
            more = f"about {_gigabytes((self.end - ALIGN) * (total - count) // count)} more" if count else "room"
            raise UserError(
                f"prep: the disk of '{self.path}' is full ({error.strerror}) after {count} of {total} images, expected "
                f"{more}; what is written is kept, and the same command goes on from there"
            ) from None


_RECORD = ("offset", "size", "crc32c", "height", "width")


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True).encode()
    return b"%08x %s\n" % (crc32c(text), text)


def _entries(journal: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """(entry, bytes of its line) up to the first line that is torn or damaged."""
    for line in journal.splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != b"%08x " % crc32c(text):
            return
        yield json.loads(text), len(line)


def _check_folder(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"prep: '{path}' is a file, expected a new or empty folder for the store")
    names = sorted(os.listdir(path))
    if names and STORE_JOURNAL not in names:
        raise UserError(f"prep: '{path}' holds '{names[0]}', expected a new or empty folder for the store")


def _check_job(path: Path, job: dict[str, Any], begun: dict[str, Any]) -> None:
    for key in sorted(job.keys() | begun.keys()):
        if job.get(key) != begun.get(key):
            what = "the images have changed since" if key in ("digest", "count") else f"{key} was {begun.get(key)!r}"
            raise UserError(
                f"prep: '{path}' was begun for something else ({what}), expected the same images and {key} "
                f"{job.get(key)!r}; name another folder or delete this one"
            )


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _replace(path: Path, write: Any) -> None:
    """Write a file beside, flush it, give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
