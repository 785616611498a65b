"""Hugging Face data sets from local files: parquet as the hub serves it, or the arrow files of `save_to_disk`.

Needs pyarrow, which is imported when such a file is opened. Nothing is downloaded and no loading script is run.
"""

import json
import threading
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mimfast._check import UserError
from mimfast.data.index import MAX_CLASSES

_IMAGES = ("image", "img", "images", "jpg", "png", "webp", "picture", "photo")
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
_KEPT_BYTES = 256 << 20


class Parquet:
    """The rows of parquet or arrow files, file by file, under the names `file-row`.

    The image column is the one the data set declares as an image, else the one binary column; its bytes are the image
    file. The label column is the one declared as class labels, else an integer column called `label` or the like. Arrow
    files are read at random from a memory map. Parquet is read by row groups, the last ones kept in memory: fast in
    order (`mimfast prep`), slow at random when the groups are large.

    paths: the files. Raises UserError when pyarrow is missing, for a file that cannot be read, without one image column
    or without rows.
    """

    def __init__(self, paths: list[str]) -> None:
        if find_spec("pyarrow") is None:
            raise UserError(
                f"data: '{paths[0]}' needs the package pyarrow, which is not installed: pip install pyarrow"
            )
        self.paths = paths
        self._files = [_open(path) for path in paths]
        self._columns = _Columns(self._files[0].schema, paths[0])
        self._starts = _starts([rows for file in self._files for rows in file.group_rows])
        self._group_of = [(f, g) for f, file in enumerate(self._files) for g in range(len(file.group_rows))]
        if len(self) == 0:
            raise UserError(f"data: '{paths[0]}' has no rows in {len(paths)} files, expected at least one image")
        self._file_starts = _starts([sum(file.group_rows) for file in self._files])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._labels = self._read_labels()
        self._classes = self._columns.classes
        if self._labels is not None and self._classes is None:
            self._classes = [str(label) for label in range(int(self._labels.max()) + 1)]

    @property
    def classes(self) -> list[str] | None:
        return self._classes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError when the row holds none or its file cannot be read."""
        group = int(np.searchsorted(self._starts, i, "right")) - 1
        try:
            value = self._group(group)[i - int(self._starts[group])].as_py()
        except ValueError as error:  # what pyarrow raises for damaged pages
            raise OSError(f"row group of '{self.paths[self._group_of[group][0]]}' is damaged ({error})") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            raise OSError("the row has no image bytes" + (f", only the path '{path}'" if path else ""))
        return data

    def name(self, i: int) -> str:
        file = int(np.searchsorted(self._file_starts, i, "right")) - 1
        return f"{Path(self.paths[file]).name.rsplit('.', 1)[0]}-{i - int(self._file_starts[file]):07d}"

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])

    def _group(self, group: int) -> Any:
        """The image column of a row group."""
        with self._lock:
            column = self._kept.get(group)
            if column is None:
                file, part = self._group_of[group]
                column = self._kept[group] = self._files[file].column(part, self._columns.image)
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return column

    def _read_labels(self) -> np.ndarray | None:
        """int64 (N,), or None when there are none, some are missing or there are too many kinds."""
        name = self._columns.label
        if name is None:
            return None
        try:
            parts = [self._files[f].column(g, name) for f, g in self._group_of]
        except (OSError, ValueError) as error:
            _unreadable(self.paths[0], f"its labels: {error}")
        if any(part.null_count for part in parts):
            return None
        labels = np.concatenate([np.asarray(part.to_numpy(zero_copy_only=False), np.int64) for part in parts])
        return labels if labels.min() >= 0 and labels.max() < MAX_CLASSES else None


class _Columns:
    """Which columns hold images and labels: what `datasets` wrote into the schema, or the best guess."""

    def __init__(self, schema: Any, path: str) -> None:
        features = _features(schema)
        binary = [field.name for field in schema if _is_image(field.type)]
        declared = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in binary]
        candidates = [name for name in _IMAGES if name in (declared or binary)] or declared or binary
        if not candidates or (len(candidates) > 1 and candidates[0] not in _IMAGES):
            raise UserError(
                f"data: '{path}' has columns {', '.join(schema.names)}, expected one of images because "
                f"{len(candidates)} hold bytes"
            )
        self.image = candidates[0]
        self.label, self.classes = None, None
        for name, feature in features.items():
            if feature.get("_type") == "ClassLabel" and name in schema.names:
                self.label, self.classes = name, [str(item) for item in feature.get("names", [])] or None
                return
        integers = [field.name for field in schema if str(field.type).startswith(("int", "uint"))]
        self.label = next((name for name in _LABELS if name in integers), None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class _ParquetFile:
    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path, memory_map=True)
        self.schema = self._file.schema_arrow
        self.group_rows = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]

    def column(self, group: int, name: str) -> Any:
        return self._file.read_row_group(group, columns=[name]).column(name).combine_chunks()


class _ArrowFile:
    """The stream format that `save_to_disk` and the cache of `datasets` use, or the file format."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        with open(path, "rb") as file:
            opener = pa.ipc.open_file if file.read(6) == b"ARROW1" else pa.ipc.open_stream
        table = opener(pa.memory_map(path)).read_all()
        self.schema = table.schema
        self._batches = table.to_batches()
        self.group_rows = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> Any:
        return self._batches[group].column(name)


def _open(path: str) -> _ParquetFile | _ArrowFile:
    import pyarrow as pa

    try:
        return _ArrowFile(path) if path.endswith(".arrow") else _ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        _unreadable(path, str(error).splitlines()[0] if str(error) else type(error).__name__)


def _unreadable(path: str, reason: str) -> NoReturn:
    kind = Path(path).suffix[1:]
    raise UserError(f"data: '{path}' cannot be read ({reason.rstrip('.')}), expected a whole {kind} file")


def _starts(rows: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
