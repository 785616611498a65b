"""Finds the compiled core, mimfast._core, once, and says in a sentence why it or its CUDA half is missing.

CMakeLists.txt builds the core from csrc/. When setup.py could not build it, it left the reason in mimfast/_core.txt.
Imports no torch.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

NOTE = Path(__file__).resolve().parent / "_core.txt"
HOW = "install g++ 9 or newer and reinstall with MIMFAST_NATIVE=1"


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("mimfast._core"), None
    except ModuleNotFoundError as error:
        if error.name != "mimfast._core":
            raise
    except ImportError as error:
        return None, f"mimfast._core was built but cannot be loaded ({error}); reinstall with MIMFAST_NATIVE=1"
    if NOTE.exists():
        return None, f"mimfast._core was not built: {NOTE.read_text().strip()}"
    return None, f"mimfast._core was not built: this copy was installed or is run without its native part; {HOW}"


def core() -> ModuleType | None:
    """The module mimfast._core, or None; `why_missing` then has the reason."""
    return _load()[0]


def why_missing() -> str | None:
    """Why there is no native core and how to get it, as a sentence without its full stop; None when it is there."""
    return _load()[1]


def has_cuda() -> bool:
    """Whether CUDA kernels are compiled into the core. Says nothing about a device or a driver."""
    return why_no_cuda() is None


def why_no_cuda() -> str | None:
    """Why no CUDA kernels are compiled in and how to get them, a sentence without its full stop; None when they are."""
    module = core()
    if module is None:
        return why_missing()
    return None if module.cuda_archs() else f"mimfast._core has no CUDA kernels: {module.cuda_missing()}"


def source_hash(op: str) -> str | None:
    """sha256 over the csrc files the CUDA kernel of `op` is made of (csrc/README.md); None without core or op."""
    module = core()
    return module.source_hash(op) if module is not None else None
