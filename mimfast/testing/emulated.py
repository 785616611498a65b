"""The native core with its CUDA kernels run on the CPU: csrc compiled by g++ through csrc/emulate.h.

`core()` has the functions of mimfast._core; those that end in _cuda take addresses in CPU memory and ignore the stream.
Objects are kept in the cache folder, each under a hash of its source, the headers it includes and the command.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from mimfast.data.cpu import default_workers
from mimfast.data.index import cache_root

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def why_not() -> str | None:
    """Why the kernels cannot be emulated here, as a sentence without its full stop; None when they can."""
    if not (CSRC / "emulate.h").exists():
        return f"the kernels' sources are not at {CSRC}; run from a source tree"
    if shutil.which("g++") is None:
        return "g++ was not found and emulated kernels are compiled when they are tested; install g++ 9 or newer"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h was not found; install python3-dev"
    return None if _pybind11() else "pybind11 was not found; pip install pybind11"


@cache
def core() -> ModuleType:
    """Compile what has changed and load. CalledProcessError below the compiler's words when csrc is broken."""
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-pthread"]
    flags += ["-fvisibility=hidden", "-DMIMFAST_CUDA", '-DMIMFAST_CUDA_ARCHS="emulated"']
    flags += [f"-I{_pybind11()}", f"-I{sysconfig.get_paths()['include']}"]
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    sources = sorted(path for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu"))
    with ThreadPoolExecutor(default_workers()) as pool:
        objects = list(pool.map(lambda path: _compiled(path, flags, version), sources))
    target = _kept(
        "\n".join([*map(str, objects), version]).encode(), f"_core{sysconfig.get_config_var('EXT_SUFFIX')}",
        ["g++", "-shared", "-pthread", *map(str, objects)],
    )  # fmt: skip
    # a package name of its own: pybind11 keeps one module per full name
    spec = importlib.util.spec_from_file_location("mimfast_emulated._core", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiled(path: Path, flags: list[str], version: str) -> Path:
    """The object file of a source."""
    key = b"\0".join([" ".join([version, *flags]).encode(), *(part.read_bytes() for part in _included(path))])
    return _kept(key, f"{path.name}.o", ["g++", *flags, "-c", "-x", "c++", str(path)])


def _included(path: Path) -> list[Path]:
    """A file of csrc and what it includes from there, directly or not."""
    found = [path]
    for part in found:
        names = re.findall(r'^\s*#\s*include "(.*)"', part.read_text(), re.MULTILINE)
        found += [CSRC / name for name in dict.fromkeys(names) if CSRC / name not in found]
    return found


def _kept(key: bytes, name: str, command: list[str]) -> Path:
    """What `command -o FILE` makes, from the cache when it is there."""
    folder = cache_root() / "emulated" / hashlib.sha256(key).hexdigest()[:32]
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:  # another process may be making the same
            subprocess.run([*command, "-o", os.path.join(draft, name)], check=True)
            os.replace(os.path.join(draft, name), folder / name)
    return folder / name


def _pybind11() -> Path | None:
    """The folder of pybind11's headers: the package's, or the copy that torch brings."""
    for name in ("pybind11", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11" / "pybind11.h").exists():
                return include
    return None
