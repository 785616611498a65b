"""The native core with its CUDA kernels run on the CPU: csrc compiled by g++ through csrc/emulate.h, once per process.

`core()` has the functions of mimfast._core; those that end in _cuda take addresses in CPU memory and ignore the stream.
"""

import atexit
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

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
    """Compile (about ten seconds) and load. CalledProcessError below the compiler's words when csrc is broken."""
    folder = tempfile.mkdtemp(prefix="mimfast-emulated-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder) / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{_pybind11()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread"]
    define = ["-fvisibility=hidden", "-DMIMFAST_CUDA", '-DMIMFAST_CUDA_ARCHS="emulated"']
    host = sorted(str(path) for path in CSRC.glob("*.cpp"))
    device = sorted(str(path) for path in CSRC.glob("*.cu"))
    subprocess.run(["g++", *flags, *define, *include, "-o", str(target), *host, "-x", "c++", *device], check=True)
    # a package name of its own: pybind11 keeps one module per full name
    spec = importlib.util.spec_from_file_location("mimfast_emulated._core", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pybind11() -> Path | None:
    """The folder of pybind11's headers: the package's, or the copy that torch brings."""
    for name in ("pybind11", "torch"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11" / "pybind11.h").exists():
                return include
    return None
