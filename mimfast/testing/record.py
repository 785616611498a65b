"""Records of what was measured: the machine, the sources, the results, as JSON."""

import contextlib
import json
import os
import platform
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a record must say about the machine it was made on."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "driver": _driver(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        facts["capability"] = list(torch.cuda.get_device_capability(0))
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    return facts


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return (
            subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
        )
    return None


def sources() -> dict[str, dict[str, str]]:
    """The present source hash of every op x implementation that has one."""
    from mimfast import ops
    from mimfast.ops._choice import source_hash

    hashes = {op: {i: source_hash(op, i) for i in import_module(f"mimfast.ops.{op}").IMPLS} for op in ops.__all__}
    return {op: {i: h for i, h in by_impl.items() if h is not None} for op, by_impl in hashes.items()}


def write_record(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` with the machine, the time (UTC) and the source hashes as JSON."""
    head = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "sources": sources()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | content, indent=1) + "\n")
