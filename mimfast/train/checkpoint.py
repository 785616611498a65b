"""Checkpoints under a commit protocol: a folder is either whole and says so in its manifest, or it is not a checkpoint.

Write into step_N.tmp-<random>, fsync every file, write and fsync manifest.json (sizes, sha256, versions,
configuration), rename to step_N, fsync the parent, and only then write its name into the file `latest`. A reader
trusts manifests, never names. Old checkpoints are removed only when a newer whole one stands beside them. Loading
runs no code: safetensors for weights, weights_only for the rest.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimfast._weights import metadata

MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    state: dict[str, Any],
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Commit one checkpoint.

    Args:
        folder: the run's checkpoints folder; made when missing.
        step: steps done.
        weights: the method's state dict.
        config: the method's plain values, kept in the weights file so that `mimfast.load` can build the method from it.
        state: tensors, numbers, texts, lists and dicts only, so that `weights_only` can read them (optimizer,
            generators, meter).
        about: JSON values for the manifest (configuration, versions).
        keep: newest checkpoints to keep.
    Returns:
        the checkpoint's folder.
    Raises:
        OSError: nothing could be written; what was there before is still there, and no half checkpoint is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    draft = folder / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir()
        # safetensors refuses tensors that share memory, hence the copies
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
        save_file(copies, draft / "model.safetensors", metadata(config))
        torch.save(state, draft / "state.pt")
        files = {}
        for path in sorted(draft.iterdir()):
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        text = json.dumps({"step": step, "files": files, **about}, indent=1)
        (draft / MANIFEST).write_text(text, encoding="utf-8")
        _sync(draft / MANIFEST)
        _sync(draft)
        if final.exists():
            # a resume starts from the newest whole checkpoint, so one that already has this later step is not whole
            shutil.rmtree(final)
        os.replace(draft, final)
        _sync(folder)
        _point(folder, final.name)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _purge(folder, final, keep)
    return final


def _point(folder: Path, name: str) -> None:
    draft = folder / "latest.tmp"
    draft.write_text(name + "\n", encoding="utf-8")
    _sync(draft)
    os.replace(draft, folder / "latest")
    _sync(folder)


def _purge(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the `keep` newest, and the drafts that killed runs left behind; `newest` is known to be whole."""
    done = sorted(p for p in folder.glob("step_*") if p.is_dir() and ".tmp-" not in p.name and p.name <= newest.name)
    for path in [*done[:-keep], *folder.glob("step_*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest_by_parts(file)
        )


def _digest_by_parts(file: Any) -> str:
    whole = hashlib.sha256()
    while part := file.read(1 << 20):
        whole.update(part)
    return whole.hexdigest()


def fault(path: Path) -> str | None:
    """Why the folder is not a whole checkpoint, as a sentence; None when it is."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{path} has no {MANIFEST}: it was never committed"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path / MANIFEST} cannot be read"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"
        if _digest(file) != entry["sha256"]:
            return f"{file} does not match the checksum in its manifest"
    return None


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint or None; `warn` hears one sentence for each newer one that is not whole."""
    # names, not `latest`: a run killed between the rename and `latest` leaves a newer whole checkpoint
    for name in sorted((p.name for p in folder.glob("step_*") if ".tmp-" not in p.name), reverse=True):
        why = fault(folder / name)
        if why is None:
            return folder / name
        warn(f"checkpoint skipped: {why}")
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(weights, state, manifest) of a checkpoint folder, on the CPU."""
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return load_file(path / "model.safetensors"), state, json.loads((path / MANIFEST).read_text(encoding="utf-8"))
