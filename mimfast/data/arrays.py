"""Images kept as one array: .npz and .npy files, and the binary files of CIFAR. Nothing that could run code is read.

CIFAR's binary version is records of label bytes and 3072 bytes, the red, green and blue planes of a 32x32 image
(Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html); its Python version is a pickle and is refused.
"""

import os
import zipfile
from typing import NoReturn

import numpy as np

from mimfast._check import UserError
from mimfast.data.pixels import ppm

_IMAGES = ("images", "image", "x_train", "train_images", "x", "data", "arr_0")
_LABELS = ("labels", "label", "y_train", "train_labels", "y", "targets", "target", "arr_1")
_PLANES = 3 * 32 * 32
_CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Arrays:
    """Images of one array, under the names `0000000`, `0000001`, ...

    images: uint8 (N, H, W, 3), (N, 3, H, W), gray (N, H, W) or (N, H, W, 1), or rows of 3 H H or H H values (planes).
    labels: integers (N,), 0 or more, or None. classes: their names; default: the numbers. origin: its name in messages.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        origin: str = "array",
    ) -> None:
        self._images = _channels_last(images, origin)
        self._labels = None if labels is None else _checked(labels, len(images), origin)
        self._classes = classes
        if self._labels is not None and classes is None:
            self._classes = [str(label) for label in range(int(self._labels.max()) + 1)]

    @property
    def classes(self) -> list[str] | None:
        return self._classes

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, i: int) -> np.ndarray:
        """uint8 (H, W, 3), a view or a copy."""
        image = np.ascontiguousarray(self._images[i])
        return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)

    def shapes(self, min_side: int | None = None) -> np.ndarray:
        """int32 (N, 2), height and width of every image: one size, whatever `min_side`."""
        return np.broadcast_to(np.array(self._images.shape[1:3], np.int32), (len(self), 2))

    def read(self, i: int) -> bytes:
        """Image i as a PPM file."""
        return ppm(self.pixels(i))

    def name(self, i: int) -> str:
        return f"{i:07d}"

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])


def open_arrays(paths: list[str]) -> Arrays:
    """One .npz (images under `images`, `x_train`, ..., labels under `labels`, `y_train`, ...; loaded into memory), one
    .npy (memory-mapped; labels in `<name>_labels.npy` when that exists) or CIFAR's .bin files. Raises UserError."""
    path = paths[0]
    try:
        if path.endswith(".npz"):
            return _from_npz(path)
        if path.endswith(".bin"):
            return _from_cifar(paths)
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        beside = path.removesuffix(".npy") + "_labels.npy"
        labels = np.load(beside, allow_pickle=False) if os.path.exists(beside) else None
        return Arrays(np.asarray(images), labels, origin=path)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        pickled = any(word in str(error) for word in ("pickle", "Python objects"))
        reason = "it holds pickled objects, which could run code" if pickled else str(error)
        raise UserError(f"data: '{path}' cannot be read ({reason}), expected a whole file of plain arrays") from None


def _from_npz(path: str) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        images = _pick(file.files, _IMAGES)
        if images is None:
            _refuse(path, f"arrays {', '.join(file.files) or 'none'}", f"one called {', '.join(_IMAGES)}")
        labels = _pick(file.files, _LABELS)
        return Arrays(file[images], None if labels is None else file[labels], origin=path)


def _pick(found: list[str], wanted: tuple[str, ...]) -> str | None:
    by_lower = {name.lower(): name for name in found}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _from_cifar(paths: list[str]) -> Arrays:
    """One label byte makes it CIFAR-10, two (coarse, fine) CIFAR-100."""
    parts = [np.memmap(path, np.uint8, "r").view(np.ndarray) for path in paths]
    width = next((width for width in (1, 2) if all(part.size % (width + _PLANES) == 0 for part in parts)), None)
    if width is None:
        _refuse(paths[0], f"{parts[0].size} bytes", f"a multiple of {1 + _PLANES} or {2 + _PLANES}")
    rows = np.concatenate([part.reshape(-1, width + _PLANES) for part in parts])
    labels = rows[:, width - 1]
    known = _CIFAR10 if width == 1 and labels.max() < len(_CIFAR10) else None
    return Arrays(rows[:, width:], labels, known, paths[0])


def _channels_last(images: np.ndarray, origin: str) -> np.ndarray:
    """uint8 (N, H, W, 1 or 3), a view."""
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim < 2 or 0 in shape:
        _refuse(origin, f"images of dtype {images.dtype} and shape {shape}", "uint8 images, at least one")
    if images.ndim == 2:
        for planes in (3, 1):
            side = round((shape[1] / planes) ** 0.5)
            if side * side * planes == shape[1]:
                return images.reshape(-1, planes, side, side).transpose(0, 2, 3, 1)
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and shape[-1] in (1, 3):
        return images
    if images.ndim == 4 and shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    _refuse(origin, f"images of shape {shape}", "(N, H, W, 3), (N, 3, H, W), (N, H, W), or rows of square images")


def _checked(labels: np.ndarray, count: int, origin: str) -> np.ndarray:
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        found = f"labels of dtype {labels.dtype} and shape {labels.shape}"
        _refuse(origin, found, f"integers from 0 on of shape ({count},), one an image")
    return labels.astype(np.int64)


def _refuse(origin: str, found: str, wanted: str) -> NoReturn:
    raise UserError(f"data: '{origin}' has {found}, expected {wanted}")
