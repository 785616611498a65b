"""A checkpoint is whole or it is not one: damage, drafts, full disks and old ones."""

import json
import os

import pytest
import torch

from mimfast.train import checkpoint


def _save(folder, step, keep=3, **extra):
    weights = {"a": torch.full((4, 3), float(step)), "b": torch.arange(5)}
    state = {"optimizer": {"state": {0: {"step": torch.tensor(float(step))}}}, "rng": torch.get_rng_state(), **extra}
    return checkpoint.save(folder, step, weights, {"method": "MAE"}, state, {"images": 7}, keep)


def _quiet(text):
    raise AssertionError(f"unexpected warning: {text}")


def test_round_trip_and_latest(tmp_path):
    path = _save(tmp_path, 3)
    assert checkpoint.newest(tmp_path, _quiet) == path
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    weights, state, manifest = checkpoint.load(path)
    assert torch.equal(weights["a"], torch.full((4, 3), 3.0))
    assert state["optimizer"]["state"][0]["step"] == 3
    assert (manifest["step"], manifest["images"]) == (3, 7)
    assert sorted(manifest["files"]) == ["model.safetensors", "state.pt"]


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, os.remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    damage(bad / name)
    if name == "manifest.json" and damage is _flip:
        (bad / name).write_text("{")
    heard = []
    assert checkpoint.newest(tmp_path, heard.append) == good
    assert len(heard) == 1
    assert "checkpoint skipped" in heard[0]
    assert name in heard[0]


def test_a_folder_without_manifest_and_a_draft_are_no_checkpoints(tmp_path):
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_00000009.tmp-abc").mkdir()
    heard = []
    assert checkpoint.newest(tmp_path, heard.append) is None
    assert heard == [f"checkpoint skipped: {tmp_path / 'step_00000009'} has no manifest.json: it was never committed"]


def test_only_the_newest_are_kept_and_drafts_of_killed_runs_go(tmp_path):
    (tmp_path / "step_00000001.tmp-dead").mkdir()
    for step in range(1, 6):
        _save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000005"]


@pytest.mark.parametrize("call", ["save_file", "_sync", "_digest"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_half_one(tmp_path, monkeypatch, call):
    before = _save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("step_*")] == [before.name]
    assert checkpoint.newest(tmp_path, _quiet) == before


@pytest.mark.parametrize("crash_at", ["model.safetensors", "rename", "latest"])
def test_a_crash_at_any_point_shows_the_old_or_the_new_whole_one(tmp_path, monkeypatch, crash_at):
    _save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def crash(*_):
        raise Killed

    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_a, **_k: None)  # a killed process cleans nothing up
    if crash_at == "model.safetensors":
        monkeypatch.setattr(torch, "save", crash)
    elif crash_at == "rename":
        monkeypatch.setattr(checkpoint.os, "replace", crash)
    else:
        monkeypatch.setattr(checkpoint, "_point", crash)
    with pytest.raises(Killed):
        _save(tmp_path, 2)
    monkeypatch.undo()
    newest = checkpoint.newest(tmp_path, _quiet)
    assert newest.name == ("step_00000002" if crash_at == "latest" else "step_00000001")
    assert checkpoint.fault(newest) is None
    _save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_loading_runs_no_code(tmp_path):
    path = _save(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"optimizer": Evil()}, path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load(path)


def test_the_manifest_is_json_with_sizes_and_sums(tmp_path):
    path = _save(tmp_path, 1)
    entry = json.loads((path / "manifest.json").read_text())["files"]["model.safetensors"]
    assert entry["bytes"] == (path / "model.safetensors").stat().st_size
    assert len(entry["sha256"]) == 64
