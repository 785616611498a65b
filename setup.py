"""Everything is in pyproject.toml, but for the list of packages and the native core, which CMake builds.

MIMFAST_NATIVE=0     no native core
MIMFAST_NATIVE=1     the core is required; CUDA kernels when nvcc works
MIMFAST_NATIVE=cuda  the core with CUDA kernels is required
not set              whatever this machine can build; what is missing is said here and by `mimfast doctor`
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("MIMFAST_NATIVE", "")
NOTE = "_core.txt"  # why there is no core; read by mimfast/_native.py
HOW = "install g++ 9 or newer and reinstall with MIMFAST_NATIVE=1"
OFF = "it was switched off by MIMFAST_NATIVE=0 at install; reinstall with MIMFAST_NATIVE=1"
if NATIVE not in ("", "0", "1", "cuda"):
    raise SystemExit(
        f"mimfast: MIMFAST_NATIVE has {NATIVE!r}, expected 0, 1, cuda or nothing because setup.py knows these four"
    )


class CMakeBuild(build_ext):
    """Run CMake in a fresh folder: a cache would keep paths of the build environment, which pip throws away."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = target.parent / NOTE
        target.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        problem = OFF if NATIVE == "0" else self._cmake(target.parent)
        if problem is None:
            return
        if NATIVE in ("1", "cuda"):
            raise SystemExit(f"mimfast: MIMFAST_NATIVE={NATIVE} cannot be met: {problem}")
        target.unlink(missing_ok=True)  # a core of older sources is worse than none
        note.write_text(problem + "\n")
        print(f"mimfast: installing without the native core, in pure Python: {problem}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable install or `build_ext --inplace`: what was built, or the note, replaces what stood there."""
        built, source = Path(self.build_lib) / "mimfast", ROOT / "mimfast"
        (source / Path(self.get_ext_filename("mimfast._core")).name).unlink(missing_ok=True)
        (source / NOTE).unlink(missing_ok=True)
        if (built / NOTE).exists():
            shutil.copy(built / NOTE, source / NOTE)
        super().copy_extensions_to_source()

    def _cmake(self, out: Path) -> str | None:
        """Build into `out`; None when that worked, else a sentence without its full stop."""
        cmake = shutil.which("cmake")
        if cmake is None:
            return "cmake was not found; install cmake 3.22 or newer and reinstall with MIMFAST_NATIVE=1"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        with tempfile.TemporaryDirectory(prefix="mimfast-") as build:
            options = {
                "Python_EXECUTABLE": sys.executable,
                "MIMFAST_OUT": out,
                "MIMFAST_CUDA": "ON" if NATIVE == "cuda" else "AUTO",
            }
            configure = [cmake, *generator, "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in options.items())]
            for step in (configure, [cmake, "--build", build, "--parallel"]):
                run = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                print(run.stdout, flush=True)
                if run.returncode:
                    return _why(run.stdout)
        return None


def _why(log: str) -> str:
    """One sentence from the log of a failed CMake run; the log itself stands above it."""
    own = [line.split("mimfast: ", 1)[1] for line in log.splitlines() if line.strip().startswith("mimfast: ")]
    if own:
        return own[-1].strip()
    if "CMAKE_CXX_COMPILER" in log or ("CXX compiler" in log and "not able to compile" in log):
        return f"no working C++ compiler was found at install; {HOW}"
    if "Python" in log and "Development" in log:
        return (
            "the headers of Python were not found at install; install python3-dev and reinstall with MIMFAST_NATIVE=1"
        )
    return "the C++ build failed at install; see its log with `pip install -v` and MIMFAST_NATIVE=1"


setup(
    packages=[
        "mimfast",
        "mimfast.data",
        "mimfast.dropin",
        "mimfast.encoders",
        "mimfast.kernels",
        "mimfast.methods",
        "mimfast.ops",
        "mimfast.recipes",
        "mimfast.report",
        "mimfast.testing",
        "mimfast.train",
    ],
    package_data={"mimfast": ["verified.json"]},
    include_package_data=False,
    ext_modules=[Extension("mimfast._core", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
