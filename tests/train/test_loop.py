"""Whole runs, tiny: the same bits for any worker count, exact resume, clean stops, honest refusals, a complete run
folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mimfast
from mimfast._check import UserError
from mimfast.data import fill
from mimfast.settings import override, read_toml, to_toml
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import checkpoint, folder, loop
from mimfast.train.metrics import read

PACKAGE = Path(mimfast.__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def clean(images, tmp_path_factory):
    """A finished run without interruption."""
    recipe = tiny_recipe(images, tmp_path_factory.mktemp("runs") / "clean")
    assert loop.pretrain(recipe).step == 6
    return Path(recipe.run.out)


def _losses(out):
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read(out / "metrics.jsonl")]


def _same_result(a, b):
    assert _losses(a) == _losses(b)
    one, two = (load_file(out / "checkpoints/step_00000006/model.safetensors") for out in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_one_seed_gives_the_same_bits_for_any_number_of_workers(images, clean, tmp_path, workers):
    recipe = tiny_recipe(images, tmp_path / "run")
    loop.pretrain(replace(recipe, data=replace(recipe.data, workers=workers)))
    _same_result(clean, tmp_path / "run")


def test_another_seed_gives_other_losses(images, clean, tmp_path):
    loop.pretrain(tiny_recipe(images, tmp_path / "run", seed=1, steps=2))
    assert _losses(tmp_path / "run")[0] != _losses(clean)[0]


def test_the_folder_is_complete(clean):
    found = {p.name for p in clean.iterdir()}
    written = "config.toml metrics.jsonl loss.png reconstruction.png report.html results.json encoder.safetensors"
    assert {*written.split(), "checkpoints", "status.json"} <= found
    assert folder.status(clean) == {"state": "finished", "step": 6, "steps": 6}
    lines = read(clean / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = "step epoch loss lr images_per_second data_wait grad_norm memory skipped bad_images"
    wanted += " data_read_s data_decode_s data_crop_s data_transfer_s"
    assert all(set(wanted.split()) <= line.keys() for line in lines)
    assert lines[-1]["epoch"] == pytest.approx(6 * 4 / 9, abs=1)
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in lines)
    # nothing is decoded twice: the images stay in the cache
    assert lines[0]["data_decode_s"] > 0
    assert lines[-1]["data_decode_s"] == lines[-1]["data_read_s"] == 0
    assert all(line["data_crop_s"] > 0 for line in lines)
    errors = json.loads((clean / "results.json").read_text())["reconstruction"]["mse"]
    assert all(0 < error < 1 for error in errors.values())


def test_the_encoder_and_the_checkpoint_load(clean):
    encoder = mimfast.load(clean / "encoder.safetensors")
    method = mimfast.load(clean / "checkpoints/step_00000006/model.safetensors")
    assert (type(encoder).__name__, type(method).__name__) == ("ViT", "MAE")
    img = torch.zeros(1, 3, 16, 16)
    assert torch.equal(encoder(img), method.encoder(img))


def test_the_resolved_configuration_repeats_the_run(images, clean, tmp_path):
    recipe = override(tiny_recipe("elsewhere", "elsewhere", seed=5), read_toml(clean / "config.toml"), "config.toml")
    assert to_toml(recipe) == to_toml(tiny_recipe(images, clean))
    loop.pretrain(replace(recipe, run=replace(recipe.run, out=str(tmp_path / "again"))))
    _same_result(clean, tmp_path / "again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_signal_stops_after_the_step_and_resume_is_exact(images, tmp_path, monkeypatch, capsys, number, log_every):
    whole, broken = (tiny_recipe(images, tmp_path / name, log_every=log_every) for name in ("whole", "broken"))
    loop.pretrain(whole)
    original = loop._loss

    def kill_in_third_step(job, model, batch):
        if job.step == 2:
            os.kill(os.getpid(), number)
        return original(job, model, batch)

    monkeypatch.setattr(loop, "_loss", kill_in_third_step)
    outcome = loop.pretrain(broken)
    assert (outcome.step, outcome.stopped_by) == (3, number)
    assert folder.status(outcome.folder)["state"] == "stopped"
    assert f"continue with: mimfast pretrain --resume --out {outcome.folder}" in capsys.readouterr().out
    monkeypatch.undo()
    assert loop.pretrain(broken, resume=True).stopped_by is None
    _same_result(tmp_path / "whole", tmp_path / "broken")


def test_kill_minus_nine_loses_only_the_steps_since_the_last_commit(images, clean, tmp_path):
    out = tmp_path / "killed"
    recipe = tiny_recipe(images, out)
    (tmp_path / "config.toml").write_text(to_toml(recipe))
    # the process sleeps in its fifth step, so that the kill surely meets it there
    code = (
        "import sys, time\nfrom mimfast import recipes, settings\nfrom mimfast.train import loop\n"
        "real = loop._loss\n"
        "loop._loss = lambda job, *a: time.sleep(600) if job.step == 4 else real(job, *a)\n"
        "loop.pretrain(settings.override(recipes.mae_photos(), settings.read_toml(sys.argv[1]), 'file'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "config.toml")], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints/latest").is_file() or "4" not in (out / "checkpoints/latest").read_text():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert loop.pretrain(recipe, resume=True).step == 6
    _same_result(clean, out)


def test_resume_falls_back_when_the_newest_checkpoint_is_damaged(images, clean, tmp_path, capsys):
    recipe = tiny_recipe(images, tmp_path / "run")
    loop.pretrain(recipe)
    newest = checkpoint.newest(tmp_path / "run/checkpoints", print)
    os.truncate(newest / "state.pt", 100)
    capsys.readouterr()
    loop.pretrain(recipe, resume=True)
    told = capsys.readouterr().out
    assert "warning: checkpoint skipped" in told
    assert "state.pt has 100 bytes" in told
    assert "continued from step 4" in told
    _same_result(clean, tmp_path / "run")


def test_a_finished_run_is_not_overwritten_and_resume_only_writes_results_again(images, clean):
    recipe = tiny_recipe(images, clean)
    before = {p: p.stat().st_mtime_ns for p in clean.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(
        UserError, match=r"holds a run \(finished, step 6 of 6\) and nothing is overwritten; pass --resume"
    ):
        loop.pretrain(recipe)
    assert before == {p: p.stat().st_mtime_ns for p in clean.rglob("*") if p.is_file() and p.name != ".lock"}
    (clean / "report.html").unlink()
    losses = _losses(clean)
    loop.pretrain(recipe, resume=True)
    assert (clean / "report.html").is_file()
    assert _losses(clean) == losses


def test_a_folder_with_other_files_or_another_process_is_refused(images, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"it holds 1 other files, such as 'letter.txt'"):
        loop.pretrain(tiny_recipe(images, tmp_path / "full"))
    with pytest.raises(UserError, match=r"expected the folder of a run because it holds no config.toml"):
        loop.pretrain(tiny_recipe(images, tmp_path / "full"), resume=True)
    claim = folder.Claim(tmp_path / "busy", False)
    with pytest.raises(UserError, match="another process is running in it"):
        folder.Claim(tmp_path / "busy", False)
    claim.release()
    folder.Claim(tmp_path / "busy", False).release()


def test_default_folders_are_numbered(tmp_path):
    assert folder.next_free("a", tmp_path).name == "a-1"
    assert folder.last_used("a", tmp_path) is None
    for name in ("a-2", "a-10", "a-x", "ab-11"):
        (tmp_path / name).mkdir()
    assert folder.next_free("a", tmp_path).name == "a-11"
    assert folder.last_used("a", tmp_path).name == "a-10"


def test_bad_settings_leave_nothing_behind(images, tmp_path):
    recipe = tiny_recipe(images, tmp_path / "run")
    with pytest.raises(UserError, match=r"img_size has 18, expected a multiple of 4"):
        loop.pretrain(replace(recipe, model=replace(recipe.model, img_size=18)))
    with pytest.raises(UserError, match=r"folder '.*nowhere' does not exist"):
        loop.pretrain(tiny_recipe(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(UserError, match="at least one visible patch"):
        loop.pretrain(replace(recipe, mask=replace(recipe.mask, ratio=0.99)))
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_named_and_the_run_goes_on(tmp_path, capsys):
    images = write_images(tmp_path / "images")
    (images / "zz_broken.png").write_bytes(b"not an image")
    out = tmp_path / "run"
    loop.pretrain(tiny_recipe(images, out, steps=12))
    assert read(out / "metrics.jsonl")[-1]["bad_images"] == 1
    assert "zz_broken.png" in (out / "report.html").read_text()
    assert "1 images could not be read and were replaced, such as 'zz_broken.png'" in capsys.readouterr().out


def test_a_full_disk_is_told_and_training_goes_on(images, clean, tmp_path, monkeypatch, capsys):
    original = checkpoint.save

    def full_once(path, step, *rest):
        if step == 4:
            raise OSError(28, "No space left on device")
        return original(path, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full_once)
    loop.pretrain(tiny_recipe(images, tmp_path / "run"))
    assert "the checkpoint of step 4 could not be written (No space left on device)" in capsys.readouterr().out
    _same_result(clean, tmp_path / "run")


def test_a_run_without_finite_gradients_ends_with_a_sentence_and_untouched_weights(images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "HOPELESS", 3)
    original = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda job, *rest: original(job, *rest) * (float("nan") if job.step >= 2 else 1))
    with pytest.raises(UserError, match=r"the gradient has 3 steps in a row that are not finite, up to step 5"):
        loop.pretrain(tiny_recipe(images, tmp_path / "run", steps=20, checkpoint_steps=1))
    saved = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert all(value.isfinite().all() for value in load_file(saved / "model.safetensors").values())


def test_one_bad_step_is_counted_and_not_applied(images, tmp_path, monkeypatch):
    original = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda job, *rest: original(job, *rest) * (float("inf") if job.step == 2 else 1))
    loop.pretrain(tiny_recipe(images, tmp_path / "run"))
    lines = read(tmp_path / "run/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert all(line["loss"] > 0 for line in lines[3:])


class _Loader(loop.Loader):
    """Remembers how many threads it had at last."""

    last = None

    def close(self):
        _Loader.last = self.workers
        super().close()


@pytest.mark.parametrize(
    ("slow", "workers", "found"), [("loader", None, 4), ("step", None, 1), ("loader", 2, 2), ("loader", 0, 0)]
)
def test_a_cpu_run_takes_as_many_threads_as_keep_up(images, tmp_path, monkeypatch, slow, workers, found):
    def slowly(call, seconds):
        def wrapped(*args):
            time.sleep(seconds)
            return call(*args)

        return wrapped

    # a share that no hiccup of a busy machine makes up
    monkeypatch.setattr(loop, "MUCH", 0.5)
    monkeypatch.setattr(loop, "Loader", _Loader)
    monkeypatch.setattr(loop, "default_workers", lambda: 4)
    if slow == "loader":
        monkeypatch.setattr(fill, "crop_rows", slowly(fill.crop_rows, 0.04))
    else:
        monkeypatch.setattr(loop, "guarded_step", slowly(loop.guarded_step, 0.08))
    recipe = tiny_recipe(images, tmp_path / "run")
    loop.pretrain(replace(recipe, data=replace(recipe.data, workers=workers)))
    assert _Loader.last == found
