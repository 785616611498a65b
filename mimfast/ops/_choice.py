"""Which implementation of an op runs, and why. `auto` searches; an explicit choice is kept or refused with a reason."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from mimfast import _native
from mimfast._check import fail

Impl = Literal["auto", "ref", "triton", "cuda", "cpu", "sdpa"]
PACKAGE = Path(__file__).resolve().parent.parent
NATIVE_OF = {"window_attention_v2": "window_attention"}  # ops whose native code is in another's files


def _constant_under_compile(fn: Callable[..., str | None]) -> Callable[..., str | None]:
    # what torch.compiler.assume_constant_result does, without its import of the compiler (3 s at `import mimfast.ops`)
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


class Status(NamedTuple):
    """One row of `mimfast doctor`: `state` is "in auto", "by name only" or "off"; `reason` is "" when in auto."""

    impl: str
    state: str
    reason: str


def resolve(op: str, impl: str, order: tuple[str, ...], why_not: Callable[[str], str | None]) -> str:
    """The implementation to run. Traceable: torch.compile sees a constant.

    Args:
        op: name of the op, for messages and for the verified records.
        impl: what the caller asked for.
        order: implementations `auto` tries, best first; "ref" ends every search and need not be named.
        why_not: None when the named implementation can take this call, else the reason, without a full stop.
    Raises:
        UserError: an explicit choice that does not exist or cannot take this call. It never falls back.
    """
    if impl == "auto":
        for name in order:
            if name != "ref" and why_not(name) is None and why_not_auto(op, name) is None:
                return name
        return "ref"
    if impl == "ref":
        return "ref"
    if impl not in order:
        offered = ", ".join(repr(name) for name in ("auto", *[n for n in order if n != "ref"], "ref"))
        fail(op, "impl", repr(impl), f"one of {offered}", "this op has no other implementation")
    reason = why_not(impl)
    if reason is not None:
        fail(op, "impl", repr(impl), "'auto', 'ref' or one that can run", reason)
    return impl


@_constant_under_compile
def why_not_on(impl: str, device: str) -> str | None:
    """Why `impl` cannot run on tensors of this device type ("cuda", "cpu") on this machine; None when it can."""
    if impl == "triton":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        if device != "cuda" and not _interpreted():
            return f"Triton compiles for CUDA tensors and these are on {device!r} (TRITON_INTERPRET=1 emulates)"
    elif impl == "cuda":
        if device != "cuda":
            return f"the CUDA kernel takes CUDA tensors and these are on {device!r}"
        return _native.why_no_cuda()
    elif impl == "cpu":
        if device != "cpu":
            return f"the native CPU code takes CPU tensors and these are on {device!r}"
        return _native.why_missing()
    return None


@_constant_under_compile
def why_not_auto(op: str, impl: str) -> str | None:
    """Why `auto` passes over an implementation that could run; None when it may take it."""
    if impl == "triton" and _interpreted():
        return "Triton's interpreter is for tests"
    return why_not_verified(op, impl)


def why_not_verified(op: str, impl: str) -> str | None:
    """Why a GPU implementation is not verified; None when a record made on a GPU holds its present sources."""
    if impl not in ("triton", "cuda"):
        return None
    record = verified().get(op, {}).get(impl)
    if record is None:
        return "no record of its tests passing on a GPU"
    if record["sources"] != source_hash(op, impl):
        return f"its sources changed since {record['record']} was made"
    return None


@cache
def source_hash(op: str, impl: str) -> str | None:
    """sha256 of what `impl` is built from.

    For Triton kernels/<op>.py and those it imports, ordered by name; for the native ones the compiled csrc files.
    """
    if impl == "triton":
        names = sorted(_kernel_files(op, set()))
        return (
            hashlib.sha256(b"".join(_kernel_file(name).read_bytes() for name in names)).hexdigest() if names else None
        )
    return _native.source_hash(NATIVE_OF.get(op, op)) if impl in ("cuda", "cpu") else None


def _kernel_file(name: str) -> Path:
    return PACKAGE / "kernels" / f"{name}.py"


def _kernel_files(name: str, known: set[str]) -> set[str]:
    """`known` with kernels/<name>.py, where there is one, and all of the folder that it imports, directly or not."""
    if name not in known and _kernel_file(name).exists():
        known.add(name)
        for other in re.findall(r"^from mimfast\.kernels\.(\w+) import", _kernel_file(name).read_text(), re.MULTILINE):
            _kernel_files(other, known)
    return known


def status(op: str) -> list[Status]:
    """The state of every implementation in the `IMPLS` of mimfast.ops.<op>, on this machine."""
    return [_status_of(op, impl) for impl in import_module(f"mimfast.ops.{op}").IMPLS]


def _status_of(op: str, impl: str) -> Status:
    if impl in ("triton", "cuda") and not torch.cuda.is_available() and not (impl == "triton" and _interpreted()):
        return Status(impl, "off", "no CUDA device")
    off = why_not_on(impl, "cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu")
    if off is not None:
        return Status(impl, "off", off)
    unverified = why_not_auto(op, impl)
    return Status(impl, "by name only", unverified) if unverified is not None else Status(impl, "in auto", "")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def verified() -> dict[str, dict[str, dict[str, str]]]:
    """The committed list of GPU implementations that passed on hardware: op -> impl -> sources, device, record."""
    return json.loads((PACKAGE / "verified.json").read_text())
