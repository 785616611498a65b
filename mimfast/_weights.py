"""Weights from and to disk: reading never executes code from a file, writing is atomic."""

import argparse
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimfast._check import UserError

# where a run, an official file or another trainer keeps the state dict inside the object it saved
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
# prefixes put before every name by DistributedDataParallel and torch.compile
PREFIXES = ("module.", "_orig_mod.")


@dataclass
class Weights:
    """What was read: tensors by name and everything around them that says how the model was made."""

    state: dict[str, Tensor]
    source: str
    config: dict[str, Any] = field(default_factory=dict)  # written by mimfast
    hf_config: dict[str, Any] = field(default_factory=dict)  # config.json
    args: dict[str, Any] = field(default_factory=dict)  # argparse.Namespace of the official trainer
    notes: list[str] = field(default_factory=list)


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Weights:
    """Read a state dict, a checkpoint object, a file (safetensors or torch) or a folder (Hugging Face's, or a run's).

    Raises:
        UserError: nothing there, an empty, damaged or foreign file, a file that asks for code.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, "a mapping")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        _refuse(path, "an existing file or folder", "nothing is there")
    return _read_file(path)


def _read_folder(path: Path) -> Weights:
    """A Hugging Face folder, or a run of ours: its newest checkpoint."""
    for pointer in (path / "checkpoints" / "latest", path / "latest"):
        if pointer.is_file():
            path = pointer.parent / pointer.read_text().strip()
            break
    for name in ("model.safetensors", "pytorch_model.bin", "encoder.safetensors"):
        if (path / name).is_file():
            weights = _read_file(path / name)
            weights.hf_config = _read_json(path / "config.json")
            return weights
    _refuse(
        path, "a folder with model.safetensors, pytorch_model.bin, encoder.safetensors or checkpoints", "it has none"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        _refuse(path, "a JSON file", _one_line(error))
    return found if isinstance(found, dict) else {}


def _config(source: str | Path, found: Any) -> dict[str, Any]:
    """What mimfast wrote beside the weights; {} for files of others."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            _refuse(source, "metadata 'mimfast' in JSON", _one_line(error))
    if found is not None and not isinstance(found, dict):
        _refuse(source, "a table under 'mimfast'", f"it holds an object of type {type(found).__name__}")
    return found or {}


def _read_file(path: Path) -> Weights:
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        _refuse(path, "a checkpoint", "the file is empty (0 bytes)")
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _read_safetensors(path)
    if head[:2] != b"PK" and head[:1] != b"\x80":
        _refuse(path, "a safetensors or torch file", f"it begins with {head[:4]!r}, as neither does")
    return _unwrap(_read_torch(path), str(path))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        _refuse(path, "a complete safetensors file", _one_line(error))
    return _without_prefixes(Weights(state, str(path), _config(path, metadata.get("mimfast"))))


def _read_torch(path: Path) -> Any:
    """`torch.load` of tensors and plain values only; argparse.Namespace is data and is in every official checkpoint.

    So is SimMIM's yacs.config.CfgNode, a dictionary, which is read as one.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            _refuse(path, "a torch checkpoint", f"it could not be read: {_one_line(error)}")
        reason = f"it asks for {name[1]!r}, which is code and not data; nothing of it was executed"
        _refuse(path, "tensors, plain values and argparse.Namespace only", reason)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # a cut or foreign file fails in as many ways as there are places to cut it
        _refuse(path, "a complete torch checkpoint", f"it could not be read: {_one_line(error)}")


def _unwrap(found: Any, source: str) -> Weights:
    weights = Weights({}, source)
    state = found
    if isinstance(found, Mapping):
        weights.config = _config(source, found.get("mimfast"))
        args = found.get("args")
        weights.args = (
            vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else {}
        )
        data = found["config"].get("DATA") if isinstance(found.get("config"), Mapping) else None
        if isinstance(data, Mapping):  # of SimMIM
            named = {"input_size": "IMG_SIZE", "mask_ratio": "MASK_RATIO", "block_size": "MASK_PATCH_SIZE"}
            weights.args |= {ours: data[theirs] for ours, theirs in named.items() if theirs in data}
        key = next((k for k in WRAPPERS if isinstance(found.get(k), Mapping)), None)
        if key is not None:
            state = found[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        what = f"keys {list(state)[:4]}" if isinstance(state, Mapping) else f"an object of type {type(state).__name__}"
        _refuse(
            source, f"a state dict, alone or under one of {list(WRAPPERS)}", f"it holds {what} and not tensors by name"
        )
    weights.state = {str(key): value for key, value in state.items()}
    return _without_prefixes(weights)


def _without_prefixes(weights: Weights) -> Weights:
    prefix = next((p for p in PREFIXES if weights.state and all(key.startswith(p) for key in weights.state)), None)
    if prefix is None:
        return weights
    weights.state = {key.removeprefix(prefix): value for key, value in weights.state.items()}
    weights.notes.append(f"took {prefix!r} off every name")
    return _without_prefixes(weights)


def metadata(config: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file of ours; "format" is what Hugging Face asks for."""
    return {"format": "pt", "mimfast": json.dumps(config)}


def write_safetensors(state: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Write tensors with the values that build their model."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_atomically(path, lambda tmp: save_file(plain, tmp, metadata(config)))


def write_torch(state: dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Write {"model": tensors, "mimfast": values}, which the official scripts read."""
    plain = {key: value.detach().cpu() for key, value in state.items()}
    write_atomically(path, lambda tmp: torch.save({"model": plain, "mimfast": config}, tmp))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary name beside `path`, then rename: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        with tmp.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _refuse(path: str | Path, wanted: str, because: str) -> NoReturn:
    raise UserError(f"load: source has {str(path)!r}, expected {wanted} because {because}")
