"""WebDataset tar shards, or any tar files of images: listed once, then read at random.

A shard is never unpacked. Members that are no plain files (links, devices, sparse files) and members whose names lead
out of the archive are left out and counted. The format is POSIX ustar with the extensions of pax (`x` records for path
and size) and GNU tar (`L` names, sizes beyond 8 GiB).
"""

import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimfast._check import UserError
from mimfast.data import columns as _columns
from mimfast.data.index import EXTENSIONS, MAX_CLASSES, Blob, cache_root, digest

_BLOCK = 512
_LONGEST_NAME = 1 << 20
_OPEN_FILES = 256
_VERSION = 1
_KINDS = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"6": "pipes", b"S": "sparse files"}
_NO_LABEL = -1


class Member(NamedTuple):
    """at: first byte of the content in the shard. kind: what is wrong with it, None for a plain file."""

    name: bytes
    at: int
    size: int
    kind: str | None


class Shards:
    """The images of tar files, in their order: shard by shard, as listed.

    Every image member is a sample, except that `key.seg.png` beside a `key.jpg` is left out (the convention of
    WebDataset: members that share all up to the first dot belong together). Labels are the numbers in `key.cls` when
    every image has one; else, as for folders, the first-level folder below what all names share, when there are 2 to
    1000 of them. With several shards a name is `shard/member`.

    paths: tar files. Raises UserError for a shard that cannot be read, is compressed, damaged or cut short, and when no
    image is found.
    """

    def __init__(self, paths: list[str], cache_dir: Path | None = None) -> None:
        self.paths = [os.path.realpath(path) for path in paths]
        stamp = _stamp(self.paths)
        cache = cache_root() if cache_dir is None else Path(cache_dir)
        file = cache / "shards" / digest("\0".join(self.paths).encode("utf-8", "surrogateescape"))
        meta, self._columns = _columns.cached(file, stamp, lambda: _scan_all(self.paths))
        self.skipped: dict[str, int] = meta["skipped"]
        self._classes: list[str] | None = meta["classes"]
        if len(self) == 0:
            raise UserError(
                f"data: {_named(paths)} no images ({_counted(self.skipped)} were seen), expected at least one member "
                "ending in .jpg, .png, .webp or another image type"
            )
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in order of their labels (the numbers themselves for .cls members), or None."""
        return self._classes

    def __len__(self) -> int:
        return len(self._columns["at"])

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError when its shard has gone, cannot be read or has become shorter."""
        shard, at, size = (int(self._columns[key][i]) for key in ("shard", "at", "size"))
        file = self._files.get(shard)
        if file is not None:
            data = os.pread(file, size, at)
        elif len(self._files) < _OPEN_FILES:
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            data = os.pread(self._files[shard], size, at)
        else:
            file = os.open(self.paths[shard], os.O_RDONLY)
            try:
                data = os.pread(file, size, at)
            finally:
                os.close(file)
        if len(data) != size:
            raise OSError(f"shard '{self.paths[shard]}' ends before byte {at + size}")
        return data

    def name(self, i: int) -> str:
        """Path of image i in its shard, after the name of the shard when there are several; bytes that are not UTF-8
        are shown as \\xNN."""
        first, last = self._columns["name_ends"][i : i + 2].tolist()
        name = self._columns["names"][first:last].tobytes().decode("utf-8", "backslashreplace")
        if len(self.paths) == 1:
            return name
        return f"{Path(self.paths[int(self._columns['shard'][i])]).name}/{name}"

    def label(self, i: int) -> int | None:
        return None if self._classes is None else int(self._columns["label"][i])

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def members(path: str) -> Iterator[Member]:
    """Every member of a tar file but folders. Raises OSError, or UserError for what is not a whole tar file."""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        at, long_name = 0, b""
        pax: dict[bytes, bytes] = {}
        while at < end:
            header = file.read(_BLOCK) if file.seek(at) == at else b""
            if len(header) < _BLOCK:
                _cut(path, f"the header at byte {at}", at + _BLOCK, end)
            if not any(header):
                return
            size, kind = _parse(path, header, at)
            size = int(pax.get(b"size", size))
            name = pax.get(b"path") or long_name or _short_name(header)
            content = at + _BLOCK
            if kind == b"S":
                content = _past_sparse_map(file, header, content)
            if content + size > end:
                _cut(path, f"member '{_shown(name)}'", content + size, end)
            at = content + -(-size // _BLOCK) * _BLOCK
            if kind in (b"L", b"K", b"x", b"g"):
                if size > _LONGEST_NAME:
                    _damaged(path, f"the header at byte {content - _BLOCK} announces a name of {size} bytes")
                data = os.pread(file.fileno(), size, content)
                if kind == b"L":
                    long_name = data.rstrip(b"\0")
                elif kind == b"x":
                    pax = _pax(path, data, content)
                continue
            long_name, pax = b"", {}
            if kind != b"5":
                plain = kind in (b"0", b"\0", b"7")
                yield Member(name, content, size, None if plain else _KINDS.get(kind, "members of unknown type"))


def _parse(path: str, header: bytes, at: int) -> tuple[int, bytes]:
    """(size, type) of a header block whose checksum fits."""
    try:
        if int(header[148:156].strip(b" \0") or b"-1", 8) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        if header[124] & 0x80:
            size = int.from_bytes(bytes([header[124] & 0x7F]) + header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        if at == 0:
            _damaged(path, "it does not begin with the header of a tar file")
        _damaged(path, f"the header at byte {at} is damaged")
    return max(size, 0), header[156:157]


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(path: str, data: bytes, at: int) -> dict[bytes, bytes]:
    """Records `length key=value\\n`."""
    records = {}
    try:
        while data.strip(b"\0"):
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].split(b" ", 1)[1][:-1].split(b"=", 1)
            records[key] = value
            if length < 5:
                raise ValueError
            data = data[length:]
        if not 0 <= int(records.get(b"size", 0)) < 1 << 62:
            raise ValueError
    except (ValueError, IndexError):
        _damaged(path, f"the extended header at byte {at} is damaged")
    return records


def _past_sparse_map(file, header: bytes, content: int) -> int:
    """Where the content begins: blocks of the map of holes may come first (GNU tar's old sparse files)."""
    more = header[482]
    while more:
        block = os.pread(file.fileno(), _BLOCK, content)
        content += _BLOCK
        more = block[504] if len(block) == _BLOCK else 0
    return content


def _stamp(paths: list[str]) -> str:
    parts = [str(_VERSION)]
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"data: shard '{path}' cannot be read ({error.strerror}), expected a tar file") from None
        parts.append(f"{status.st_size} {status.st_mtime_ns}")
    return "\n".join(parts)


class _Found:
    """Images of all shards, gathered in typed arrays."""

    def __init__(self) -> None:
        self.names = Blob()
        self.at, self.size, self.shard, self.cls = array("q"), array("q"), array("i"), array("i")
        self.folders: dict[bytes, int] = {}
        self.folder_of = array("i")
        self.skipped: Counter[str] = Counter()

    def take(self, shard: int, group: list[Member], cls: int) -> None:
        """The images among the members that share a key."""
        images = [member for member in group if _extension(member.name) in EXTENSIONS]
        simple = [member for member in images if os.path.basename(member.name).count(b".") == 1]
        for member in simple or images:
            self.names.add(member.name)
            self.at.append(member.at)
            self.size.append(member.size)
            self.shard.append(shard)
            self.cls.append(cls)
            self.folder_of.append(self.folders.setdefault(os.path.dirname(member.name), len(self.folders)))
        if simple:
            self.skipped["further images of a sample"] += len(images) - len(simple)


def _scan_all(paths: list[str]) -> tuple[dict, _columns.Columns]:
    found = _Found()
    for shard, path in enumerate(paths):
        try:
            _scan(path, shard, found)
        except OSError as error:
            raise UserError(f"data: shard '{path}' cannot be read ({error.strerror}), expected a tar file") from None
    names, name_ends = found.names.arrays()
    classes, labels = _classes(found)
    skipped = {kind: count for kind, count in sorted(found.skipped.items()) if count}
    return {"skipped": skipped, "classes": classes}, {
        "at": np.array(found.at, np.int64),
        "size": np.array(found.size, np.int64),
        "shard": np.array(found.shard, np.int32),
        "label": labels,
        "names": names,
        "name_ends": name_ends,
    }


def _scan(path: str, shard: int, found: _Found) -> None:
    group: list[Member] = []
    key, cls = b"", _NO_LABEL
    with open(path, "rb", buffering=0) as file:
        for member in members(path):
            name = member._replace(name=_inside(member.name))
            problem = member.kind or ("names outside the archive" if not name.name else None)
            if problem or os.path.basename(name.name).startswith(b"."):
                found.skipped[problem or "hidden files"] += 1
                continue
            folder, base = os.path.split(name.name)
            this = folder + b"/" + base.split(b".", 1)[0]
            if this != key:
                found.take(shard, group, cls)
                group, key, cls = [], this, _NO_LABEL
            if base.endswith(b".cls") and member.size <= 20:
                text = os.pread(file.fileno(), member.size, member.at).strip()
                cls = int(text) if text.isdigit() and int(text) < 1 << 31 else _NO_LABEL
            elif _extension(base) in EXTENSIONS:
                group.append(name)
            else:
                found.skipped["other files"] += 1
        found.take(shard, group, cls)


def _inside(name: bytes) -> bytes:
    """The name without `./`; empty when it leads out of the archive."""
    parts = [part for part in name.replace(b"\\", b"/").split(b"/") if part not in (b"", b".")]
    return b"" if name.startswith((b"/", b"\\")) or b".." in parts else b"/".join(parts)


def _extension(name: bytes) -> bytes:
    return os.path.splitext(name)[1].lower()


def _classes(found: _Found) -> tuple[list[str] | None, np.ndarray]:
    """(names or None, int32 labels)."""
    cls = np.array(found.cls, np.int32)
    if len(cls) and cls.min() >= 0 and 1 <= cls.max() < MAX_CLASSES:
        return [str(label) for label in range(int(cls.max()) + 1)], cls
    folders = [folder.split(b"/") if folder else [] for folder in found.folders]
    # what the first and the last in order share, all share
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders))))) if folders else 0
    names = sorted({folder[shared] for folder in folders if len(folder) > shared})
    if not 2 <= len(names) <= MAX_CLASSES or any(len(folder) == shared for folder in folders):
        return None, np.full(len(cls), _NO_LABEL, np.int32)
    number = {name: label for label, name in enumerate(names)}
    of_folder = np.array([number[folder[shared]] for folder in folders], np.int32)
    return [name.decode("utf-8", "backslashreplace") for name in names], of_folder[np.array(found.folder_of, np.int32)]


def _shown(name: bytes) -> str:
    return name[:200].decode("utf-8", "backslashreplace")


def _named(paths: list[str]) -> str:
    return f"shard '{paths[0]}' has" if len(paths) == 1 else f"{len(paths)} shards from '{paths[0]}' on have"


def _counted(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in skipped.items()) or "no members at all"


def _cut(path: str, what: str, needed: int, end: int) -> None:
    raise UserError(f"data: shard '{path}' is cut short: {what} needs {needed} bytes of file, found {end}")


def _damaged(path: str, what: str) -> None:
    raise UserError(f"data: shard '{path}' is damaged or no tar file: {what}, expected an uncompressed tar file")
