"""The list of images below a folder, as one compact blob, and the cache that keeps it between runs.

A folder of ten million images costs one byte array and a few integers per image, never ten million Python strings. The
blob is cached outside the data folder and trusted only while no folder of the tree has changed since it was written.
"""

import hashlib
import os
import stat
import tempfile
import time
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Read by Pillow itself, except HEIC, which needs the pillow-heif plugin: without it such a file counts as unreadable.
EXTENSIONS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .heic .heif".split()
)
MAX_CLASSES = 1000
_VERSION = 1
# A folder changed this shortly before it was scanned may change again without a new time stamp, so it is scanned again.
_RACY_NS = 2_000_000_000
_HEADER = (
    "version",
    "scanned_ns",
    "images",
    "name_bytes",
    "folders",
    "folder_bytes",
    "class_bytes",
    "other_files",
    "unreadable",
)


class Index(NamedTuple):
    """Images and folders below a root. Names are relative to the root, as the bytes the file system holds.

    name_ends: int64 (images + 1), image i is names[name_ends[i] : name_ends[i + 1]]. labels: int16 (images), -1 without
    classes. class_names: uint8, the names joined by NUL, empty without classes. folder_*: every folder visited, with
    its modification time in nanoseconds. other_files: files that are no images. unreadable: folders that could not be
    listed.
    """

    name_ends: np.ndarray
    names: np.ndarray
    labels: np.ndarray
    class_names: np.ndarray
    folder_mtimes: np.ndarray
    folder_ends: np.ndarray
    folders: np.ndarray
    scanned_ns: int
    other_files: int
    unreadable: int

    def name(self, i: int) -> bytes:
        return self.names[self.name_ends[i] : self.name_ends[i + 1]].tobytes()

    def folder(self, i: int) -> bytes:
        return self.folders[self.folder_ends[i] : self.folder_ends[i + 1]].tobytes()


class Blob:
    """Byte strings appended one after the other."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = array("q", [0])

    def add(self, item: bytes) -> None:
        self.data += item
        self.ends.append(len(self.data))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.frombuffer(self.data, np.uint8), np.frombuffer(self.ends, np.int64)


class _Folder(NamedTuple):
    images: list[bytes]
    folders: list[bytes]
    others: int


def _list_folder(path: bytes) -> _Folder:
    """Sorted image names and sub-folder names of one folder; hidden ones are left out. Raises OSError."""
    images, folders, others = [], [], 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                others += 1
            # A link that leads nowhere is listed, so that it is counted and named when read; a pipe or socket is not.
            elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                images.append(entry.name)
            else:
                others += 1
    return _Folder(sorted(images), sorted(folders), others)


def scan(root: bytes) -> Index:
    """Walk the tree below `root`: a folder's own images first, then its sub-folders, each sorted by bytes.

    Links to folders are followed; a folder reached twice (a loop of links, or two links to one place) counts once.
    Raises OSError when the root itself cannot be listed.
    """
    scanned = time.time_ns()
    names, folders = Blob(), Blob()
    mtimes, firsts = array("q"), array("h")
    classes: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    others = unreadable = 0
    todo = [b""]
    while todo:
        folder = todo.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            listing = _list_folder(path)
        except OSError:
            if not folder:
                raise
            unreadable += 1
            continue
        folders.add(folder)
        mtimes.append(status.st_mtime_ns)
        others += listing.others
        if listing.images and folder:
            top = folder.split(os.sep.encode(), 1)[0]
            # The walk finishes one first-level folder before the next, so only the last class can be this one.
            if not classes or classes[-1] != top:
                classes.append(top)
        label = len(classes) - 1 if folder and len(classes) <= MAX_CLASSES else -1
        for image in listing.images:
            names.add(os.path.join(folder, image))
            firsts.append(label)
        todo.extend(os.path.join(folder, name) for name in reversed(listing.folders))
    return _assemble(names, folders, mtimes, firsts, classes, scanned, others, unreadable)


def _assemble(
    names: Blob,
    folders: Blob,
    mtimes: array,
    firsts: array,
    classes: list[bytes],
    scanned: int,
    others: int,
    unreadable: int,
) -> Index:
    labels = np.array(firsts, np.int16)
    labelled = 2 <= len(classes) <= MAX_CLASSES and bool((labels >= 0).all())
    name_data, name_ends = names.arrays()
    folder_data, folder_ends = folders.arrays()
    return Index(
        name_ends=name_ends,
        names=name_data,
        labels=labels if labelled else np.full_like(labels, -1),
        class_names=np.frombuffer(b"\0".join(classes) if labelled else b"", np.uint8),
        folder_mtimes=np.array(mtimes, np.int64),
        folder_ends=folder_ends,
        folders=folder_data,
        scanned_ns=scanned,
        other_files=others,
        unreadable=unreadable,
    )


def pack(index: Index) -> np.ndarray:
    """The index as one uint8 array: a header of int64, the int64 sections, int16, bytes."""
    header = {
        "version": _VERSION,
        "scanned_ns": index.scanned_ns,
        "images": len(index.labels),
        "name_bytes": len(index.names),
        "folders": len(index.folder_mtimes),
        "folder_bytes": len(index.folders),
        "class_bytes": len(index.class_names),
        "other_files": index.other_files,
        "unreadable": index.unreadable,
    }
    parts = (
        np.array([header[key] for key in _HEADER], np.int64),
        index.name_ends,
        index.folder_mtimes,
        index.folder_ends,
        index.labels,
        index.names,
        index.folders,
        index.class_names,
    )
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])


def unpack(blob: np.ndarray) -> Index:
    """The inverse of `pack`, as views. Raises ValueError when the blob is of another version or cut short."""
    blob = blob.view(np.ndarray)  # slicing a memmap object is slow; a plain view stays mapped
    size = 8 * len(_HEADER)
    if blob.dtype != np.uint8 or blob.ndim != 1 or blob.size < size:
        raise ValueError("not an index")
    head = dict(zip(_HEADER, blob[:size].view(np.int64).tolist()))
    n, folders = head["images"], head["folders"]
    sizes = [
        8 * (n + 1),
        8 * folders,
        8 * (folders + 1),
        2 * n,
        head["name_bytes"],
        head["folder_bytes"],
        head["class_bytes"],
    ]
    if head["version"] != _VERSION or min(sizes) < 0 or size + sum(sizes) != blob.size:
        raise ValueError("an index of another version, or cut short")
    ends = np.cumsum([size, *sizes])
    part = np.split(blob, ends)[1:-1]
    return Index(
        name_ends=part[0].view(np.int64),
        names=part[4],
        labels=part[3].view(np.int16),
        class_names=part[6],
        folder_mtimes=part[1].view(np.int64),
        folder_ends=part[2].view(np.int64),
        folders=part[5],
        scanned_ns=head["scanned_ns"],
        other_files=head["other_files"],
        unreadable=head["unreadable"],
    )


def is_current(index: Index, root: bytes) -> bool:
    """True when no folder of the index has changed since the scan: one `stat` per folder, none per image."""
    if index.unreadable or len(index.folder_mtimes) == 0:
        return False
    if int(index.folder_mtimes.max()) >= index.scanned_ns - _RACY_NS:
        return False
    try:
        return all(
            os.stat(os.path.join(root, index.folder(i))).st_mtime_ns == mtime
            for i, mtime in enumerate(index.folder_mtimes.tolist())
        )
    except OSError:
        return False


def cache_root() -> Path:
    """The folder for everything mimfast keeps between runs: MIMFAST_CACHE, else the user's cache folder, else a
    private temporary folder when neither can be written (a read-only home)."""
    candidates = []
    if os.environ.get("MIMFAST_CACHE"):
        candidates.append(Path(os.environ["MIMFAST_CACHE"]))
    if os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(os.environ["XDG_CACHE_HOME"]) / "mimfast")
    candidates.append(Path(os.path.expanduser("~")) / ".cache" / "mimfast")
    for path in candidates:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK | os.X_OK):
            return path.resolve()
    return _private_temporary_folder()


def _private_temporary_folder() -> Path:
    """The same folder in every run of this user; one that someone else prepared under that name is not trusted."""
    uid = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"mimfast-{uid}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="mimfast-"))


def digest(name: bytes) -> str:
    """What a cache file about the thing of this name is called."""
    return hashlib.sha256(name).hexdigest()[:32]


def load_index(root: bytes, cache_dir: Path) -> Index:
    """The index of `root`, an absolute real path: from the cache when it is current, else by scanning.

    A cache that cannot be read or written only costs the scan; one inside the data folder is not used, because nothing
    is ever written there. Raises OSError when the root cannot be listed.
    """
    if os.path.join(os.fsencode(cache_dir.resolve()), b"").startswith(os.path.join(root, b"")):
        return scan(root)
    path = cache_dir / "index" / f"{digest(root)}.npy"
    try:
        index = unpack(np.load(path, mmap_mode="r", allow_pickle=False))
        if is_current(index, root):
            return index
    except (OSError, ValueError, EOFError):
        pass
    index = scan(root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, pack(index))
        os.replace(file.name, path)
    except OSError:
        pass
    return index
