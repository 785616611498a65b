"""Where images come from: a folder tree, tar shards, arrays, a mimfast store, or a set that the demo extra brings.

A source is anything with the five members of `Source`. Image i is a sample id: it does not change within a run. A
source whose images need no decoder also has `pixels(i)`, see `pixels_at`; one that knows the sizes of its images before
they are read also has `shapes(min_side)`, see `shapes_of`.
"""

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from mimfast._check import UserError
from mimfast.data import index as _index
from mimfast.data.paths import files_of, kind_of


class Source(Protocol):
    """What the loader needs. `read` gives the bytes of the image file and may raise OSError."""

    @property
    def classes(self) -> list[str] | None: ...
    def __len__(self) -> int: ...
    def read(self, i: int) -> bytes: ...
    def name(self, i: int) -> str: ...
    def label(self, i: int) -> int | None: ...


class Folder:
    """Every image below a folder, in any tree, sorted by name.

    Hidden files and folders are left out, links to folders are followed once. There are classes when every image lies
    below one of 2 to 1000 first-level folders; those are then the classes. The index is cached in `cache_dir` (default:
    `index.cache_root()`), never in the data folder.

    path: the folder. held_out: names that `split` holds out, for sets that come with a split.
    Raises UserError when the folder is missing, is no folder, cannot be listed, or holds no image.
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_dir: Path | None = None, held_out: tuple[str, ...] = ()
    ) -> None:
        self.path = Path(path)
        self.held_out = held_out
        if not self.path.is_dir():
            kind_of(os.fspath(path))  # says what is wrong
        self._root = os.fsencode(os.path.realpath(path))
        try:
            self._index = _index.load_index(self._root, _index.cache_root() if cache_dir is None else Path(cache_dir))
        except OSError as error:
            raise UserError(
                f"data: folder '{path}' cannot be listed ({error.strerror}), expected a readable folder of images"
            ) from None
        if len(self) == 0:
            raise UserError(_empty_message(path, self._index))
        names = self._index.class_names.tobytes()
        self._classes = [_printable(name) for name in names.split(b"\0")] if names else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the first-level folders in order of their labels, or None."""
        return self._classes

    @property
    def unreadable_folders(self) -> int:
        """How many sub-folders could not be listed and are therefore missing here."""
        return self._index.unreadable

    def __len__(self) -> int:
        return len(self._index.labels)

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError when the file has gone or cannot be read."""
        with open(os.path.join(self._root, self._index.name(i)), "rb") as file:
            return file.read()

    def name(self, i: int) -> str:
        """Path of image i below the folder, printable: bytes that are not UTF-8 are shown as \\xNN."""
        return _printable(self._index.name(i))

    def label(self, i: int) -> int | None:
        label = int(self._index.labels[i])
        return None if label < 0 else label


class Subset:
    """Some images of a source, under new ids 0..len-1. indices: int64 (N,), ids in `source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> bytes:
        return self.source.read(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def label(self, i: int) -> int | None:
        return self.source.label(int(self.indices[i]))

    def pixels(self, i: int) -> np.ndarray | None:
        """As `pixels_at` of the source."""
        return pixels_at(self.source, int(self.indices[i]))

    def shapes(self, min_side: int | None = None) -> np.ndarray | None:
        """As `shapes_of` the source."""
        shapes = shapes_of(self.source, min_side)
        return None if shapes is None else shapes[self.indices]


def pixels_at(source: Source, i: int) -> np.ndarray | None:
    """uint8 (H, W, 3) of image i, often a read-only view, from a source that keeps pixels; None from any other: `read`
    and decode. Raises OSError."""
    pixels = getattr(source, "pixels", None)
    return None if pixels is None else pixels(i)


def shapes_of(source: Source, min_side: int | None = None) -> np.ndarray | None:
    """int32 (N, 2), height and width of every image as it is decoded with `min_side` (see `decode.decode`), before any
    is read; None from a source that does not know them."""
    shapes = getattr(source, "shapes", None)
    return None if shapes is None else shapes(min_side)


def open_source(spec: str) -> Source:
    """The images at a path, whatever keeps them.

    spec: "photos" or "digits" (the sets of the demo extra; `./photos` names a folder); a folder of images, of tar
    shards, of parquet files, of CIFAR's binary files, of `Dataset.save_to_disk`, or a mimfast store; a .tar, .parquet,
    .arrow, .npz, .npy or .bin file; several shards as `name-{000..123}.tar` or `name-*.tar`.
    Raises UserError, with one sentence, for what cannot be read.
    """
    if spec in ("photos", "digits"):
        from mimfast.data import embedded

        return embedded.photos() if spec == "photos" else embedded.digits()
    path = os.path.expanduser(spec)
    kind = kind_of(path)
    if kind == "store":
        from mimfast.data.store import Store

        return Store(path)
    if kind in ("tar", "parquet"):
        from mimfast.data.parquet import Parquet
        from mimfast.data.tar import Shards

        return (Shards if kind == "tar" else Parquet)(files_of(path))
    if kind == "arrays":
        from mimfast.data.arrays import open_arrays

        return open_arrays(files_of(path))
    return Folder(path)


def split(source: Source, holdout: float | int = 0.1) -> tuple[Subset, Subset]:
    """(training, held out), decided by a hash of each name, so that added files do not move the others.

    holdout: a float in (0, 1) is the expected share, an int the exact number of held-out images (the share moves no
    image when files are added; the number may move one per added file). With classes each class is split on its own. At
    least one image is held out and one trained on. A source with its own split (`held_out`, e.g. the photographs: two
    photographs the model never trains on) keeps it whatever `holdout` says.
    Raises UserError for fewer than two images or a holdout that leaves one side empty.
    """
    n = len(source)
    if n < 2:
        raise UserError(f"split: source has {n} image, expected at least 2 because one is held out and one trained on")
    if isinstance(holdout, int) and not 1 <= holdout < n:
        raise UserError(f"split: holdout has {holdout}, expected 1 to {n - 1} because the source holds {n} images")
    if isinstance(holdout, float) and not 0 < holdout < 1:
        raise UserError(
            f"split: holdout has {holdout}, expected a share between 0 and 1, or a number of images of type int"
        )
    own = set(getattr(source, "held_out", ()))
    held = np.fromiter((source.name(i) in own for i in range(n)), bool, n) if own else np.zeros(n, bool)
    if not held.any():
        held = _choose(source, holdout)
    ids = np.arange(n, dtype=np.int64)
    return Subset(source, ids[~held]), Subset(source, ids[held])


def _choose(source: Source, holdout: float | int) -> np.ndarray:
    """bool (N,): the images to hold out."""
    n = len(source)
    hashes = np.fromiter((_hash(source.name(i)) for i in range(n)), np.uint64, n)
    labels = np.zeros(n, np.int64)
    if source.classes is not None:
        labels = np.fromiter((source.label(i) or 0 for i in range(n)), np.int64, n)
    held = np.zeros(n, bool)
    counts = np.bincount(labels)
    quota = _quota(counts, holdout) if isinstance(holdout, int) else np.zeros(len(counts), np.int64)
    by_class = np.argsort(labels, kind="stable")
    for label, members in enumerate(np.split(by_class, np.cumsum(counts)[:-1])):
        order = members[np.argsort(hashes[members], kind="stable")]
        if isinstance(holdout, int):
            held[order[: quota[label]]] = True
        elif len(order) >= 2:
            share = int((hashes[order] < np.uint64(holdout * 2.0**64)).sum())
            held[order[: min(max(share, 1), len(order) - 1)]] = True
    if not held.any():  # every class has one image: none can be split, so the smallest hash is held out
        held[np.argmin(hashes)] = True
    return held


def _quota(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` shared out over the classes in proportion, the remainders to the largest fractions."""
    exact = counts * (total / counts.sum())
    quota = np.floor(exact).astype(np.int64)
    for label in np.argsort(quota - exact, kind="stable")[: total - int(quota.sum())]:
        quota[label] += 1
    return quota


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _empty_message(path: str | os.PathLike[str], index: _index.Index) -> str:
    kinds = " ".join(sorted(extension.decode() for extension in _index.EXTENSIONS))
    missing = f" and {index.unreadable} sub-folders could not be listed" if index.unreadable else ""
    return (
        f"data: folder '{path}' has no images ({index.other_files} other files in {len(index.folder_mtimes)} folders "
        f"were seen{missing}), expected at least one file ending in {kinds}"
    )
