"""What keeps the images at a path: decided from names alone, before anything is opened."""

import glob
import itertools
import json
import os
import re
from typing import Literal, NoReturn

from mimfast._check import UserError
from mimfast.data.index import EXTENSIONS

Kind = Literal["folder", "store", "tar", "parquet", "arrays"]

STORE_INDEX = "index.mim"
STORE_JOURNAL = "journal"
_FILES: dict[str, Kind] = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "parquet",
    ".npz": "arrays",
    ".npy": "arrays",
    ".bin": "arrays",
}
_REFUSED = {
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"): "a compressed tar cannot be read at random: unpack it",
    (".zip", ".7z", ".rar"): "this kind of archive is not read: unpack it",
    (".pkl", ".pickle", ".pt", ".pth"): "reading a pickle can run code: save the arrays with numpy.savez",
    (".tfrecord", ".rec", ".beton", ".lmdb", ".h5", ".hdf5"): "this format is not read: write tar shards from it",
}
_URL = re.compile(r"^[a-z][a-z0-9+.]+://|^pipe:", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]+)\}")
_MOST = 100_000
_LOOK_AT = 2000  # entries of a folder that decide what it is; a folder of images may have millions


def kind_of(path: str) -> Kind:
    """Raises UserError when there is nothing, or something that is not read."""
    if _URL.match(path):
        _fail(path, "is an address", "a path because nothing is downloaded")
    if os.path.isdir(path):
        return _kind_of_folder(path)
    for extensions, reason in _REFUSED.items():
        if path.lower().endswith(extensions):
            _fail(path, "is no folder or file that can be used", f"images or shards because {reason}")
    kind = _FILES.get(os.path.splitext(path)[1].lower())
    if os.path.exists(path):
        return kind or _fail(path, "is a file", "the folder that holds the images")
    if kind and files_of(path):
        return kind
    _fail(path, "does not exist", "a folder of images, tar shards, a store, 'photos' or 'digits'", "folder ")


def files_of(path: str) -> list[str]:
    """The files a path stands for, sorted within a pattern: itself, those of a brace or glob pattern, or the shards in
    a folder. Raises UserError when a file named in braces does not exist."""
    if os.path.isdir(path):
        return _files_in(path)
    if os.path.exists(path):
        return [path]
    files = []
    for name in braces(path):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.exists(name)
        if not found and name != path:
            _fail(name, "does not exist", f"every file of '{path}'", "shard ")
        files += found
    return files


def braces(pattern: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar to a-11.tar; `{a,b}.tar` -> a.tar, b.tar; in order, several braces from the left."""
    parts: list[list[str]] = []
    last, count = 0, 1
    for match in _RANGE.finditer(pattern):
        first, end, listed = match.groups()
        if listed is None:
            low, high = int(first), int(end)
            if not low <= high < low + _MOST:
                _fail(pattern, f"has the range {first}..{end}", f"a rising one of at most {_MOST} files")
            choices = [str(number).zfill(len(first)) for number in range(low, high + 1)]
        else:
            choices = listed.split(",")
        count *= len(choices)
        if count > _MOST:
            _fail(pattern, f"stands for {count} files", f"at most {_MOST}")
        parts += [[pattern[last : match.start()]], choices]
        last = match.end()
    return ["".join(item) for item in itertools.product(*parts, [pattern[last:]])]


def _kind_of_folder(path: str) -> Kind:
    if os.path.isfile(os.path.join(path, STORE_INDEX)):
        return "store"
    if os.path.isfile(os.path.join(path, STORE_JOURNAL)):
        _fail(path, "is a store that was never finished", "a whole one: run the same mimfast prep again, it continues")
    if _files_in(path):
        return _FILES[os.path.splitext(_files_in(path)[0])[1]]
    return "folder"


def _files_in(path: str) -> list[str]:
    """Shards directly in a folder that holds no image and, beside parquet's `data`, no other folder; else nothing.
    Where some are called train, only those: the rest are splits to test on."""
    saved = _arrow_files(path)
    if saved:
        return saved
    names: dict[str, list[str]] = {".tar": [], ".parquet": [], ".bin": []}
    try:
        folders = _look(path, names)
        if folders == ["data"]:
            _look(os.path.join(path, "data"), names)
        elif folders != []:
            return []
    except OSError:
        return []  # the folder source names the reason
    names[".bin"] = [name for name in names[".bin"] if os.path.basename(name).startswith(("data_batch_", "train."))]
    found = next((sorted(files) for files in names.values() if files), [])
    return [name for name in found if os.path.basename(name).startswith("train")] or found


def _arrow_files(folder: str) -> list[str]:
    """What `Dataset.save_to_disk` wrote into this folder, or its `train` split; empty for other folders."""
    for place in (folder, os.path.join(folder, "train")):
        state = os.path.join(place, "state.json")
        if not os.path.isfile(state):
            continue
        try:
            with open(state, "rb") as file:
                names = [os.path.basename(entry["filename"]) for entry in json.load(file)["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [os.path.join(place, name) for name in names]
    return []


def _look(path: str, names: dict[str, list[str]]) -> list[str] | None:
    """Put files of the known kinds on `names`; returns the sub-folders, None when the folder holds images."""
    folders, images = [], 0
    with os.scandir(path) as entries:
        for number, entry in enumerate(entries):
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif extension in names:
                names[extension].append(entry.path)
            images += os.fsencode(extension) in EXTENSIONS
            if number == _LOOK_AT and (images or len(folders) > 1):
                return None
    return None if images else folders


def _fail(path: str, found: str, wanted: str, what: str = "") -> NoReturn:
    raise UserError(f"data: {what}'{path}' {found}, expected {wanted}")
