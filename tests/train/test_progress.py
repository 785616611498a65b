"""Runs whose images grow: exact resume at every step around a stage's edge, each sample once an epoch, honest logs."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mimfast._check import UserError
from mimfast.data.sources import open_source, split
from mimfast.recipes import Progress
from mimfast.settings import override, read_toml, to_toml
from mimfast.testing.runs import tiny_fastmim, write_images
from mimfast.train import loop
from mimfast.train.metrics import read
from mimfast.train.stages import course_of

SIZES, BATCHES = (16, 24, 32), (6, 4, 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), side=40)


def _recipe(images, out, **train):
    recipe = tiny_fastmim(images, out, **{"steps": 9, "checkpoint_steps": 1, "keep": 20, **train})
    recipe = replace(recipe, optim=replace(recipe.optim, lr=None, base_lr=0.1))
    return replace(recipe, progress=Progress(SIZES, BATCHES, (0.0, 0.4, 0.7)))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """(recipe, samples of every step) of a finished run without interruption."""
    recipe = _recipe(images, tmp_path_factory.mktemp("runs") / "whole")
    seen, real = [], loop._loss

    def note(job, model, batch):
        seen.append((batch.img.shape[-1], batch.epochs.tolist(), batch.sample_ids.tolist()))
        return real(job, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_loss", note)
        loop.pretrain(recipe)
    return recipe, seen


def _lines(out):
    return [
        {key: line[key] for key in ("step", "loss", "grad_norm", "lr", "img_size", "batch_size", "epoch")}
        for line in read(out / "metrics.jsonl")
    ]


def _folder(recipe):
    return loop.Path(recipe.run.out)


def _count(recipe):
    return len(split(open_source(recipe.data.path), recipe.data.holdout)[0])


def test_sizes_batches_and_rates_follow_the_stages(whole):
    recipe, seen = whole
    course = course_of(recipe, _count(recipe))
    edges = [stage.step for stage in course.stages]
    assert 0 < edges[1] < edges[2] < 9
    stages = [course.at(step) for step in range(9)]
    assert [(side, len(ids)) for side, _, ids in seen] == [(s.img_size, s.batch_size) for s in stages]
    lines = _lines(_folder(recipe))
    assert [(line["img_size"], line["batch_size"]) for line in lines] == [(s.img_size, s.batch_size) for s in stages]
    assert [line["epoch"] for line in lines] == pytest.approx(
        [course.samples(step + 1) / _count(recipe) for step in range(9)]
    )
    # past the warm-up the rate is the stage's peak times the cosine that runs on
    peaks = [line["lr"] / stage.batch_size for line, stage in zip(lines, stages)][2:]
    assert peaks == sorted(peaks, reverse=True)
    assert lines[edges[1]]["lr"] < lines[edges[1] - 1]["lr"] * BATCHES[1] / BATCHES[0]


def test_no_sample_is_lost_or_repeated_across_an_edge(whole):
    recipe, seen = whole
    drawn = Counter((epoch, i) for _, epochs, ids in seen for epoch, i in zip(epochs, ids))
    assert set(drawn.values()) == {1}
    last = max(epoch for epoch, _ in drawn)
    assert last >= 3
    for epoch in range(last):
        assert {i for e, i in drawn if e == epoch} == set(range(_count(recipe)))


def test_resume_at_every_step_gives_the_same_bits(whole, tmp_path):
    recipe, _ = whole
    end = load_file(_folder(recipe) / "checkpoints/step_00000009/model.safetensors")
    for done in range(1, 9):
        out = tmp_path / str(done)
        again = replace(recipe, run=replace(recipe.run, out=str(out)))
        _copy_until(_folder(recipe), out, done)
        loop.pretrain(again, resume=True)
        assert _lines(out)[done:] == _lines(_folder(recipe))[done:]
        found = load_file(out / "checkpoints/step_00000009/model.safetensors")
        assert all(torch.equal(found[name], end[name]) for name in end), f"resumed after step {done}"


def _copy_until(source, out, step):
    """The folder as a run that was interrupted after a step leaves it."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(".lock"))
    for later in (out / "checkpoints").glob("step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (out / "checkpoints/latest").write_text(f"step_{step:08d}\n")


def test_the_file_of_a_schedule_repeats_it(whole):
    recipe, _ = whole
    stored = override(tiny_fastmim("elsewhere", "elsewhere"), read_toml(_folder(recipe) / "config.toml"), "file")
    assert stored == recipe
    assert "sizes = [16, 24, 32]" in to_toml(recipe)


def test_the_start_says_all_sizes(images, tmp_path, capsys):
    loop.pretrain(_recipe(images, tmp_path / "run", log_every=3))
    told = capsys.readouterr().out
    assert "16, 24, 32 px, 75 % hidden; 9 steps of 6, 4, 3" in told
    assert "16, 24, 32 px" in (tmp_path / "run/report.html").read_text()


def test_a_size_that_does_not_fit_is_told_before_anything_is_written(images, tmp_path):
    recipe = _recipe(images, tmp_path / "run")
    bad = replace(recipe, progress=replace(recipe.progress, sizes=(20, 24, 32)))
    with pytest.raises(UserError, match=r"img_size has 20, expected a multiple of 8"):
        loop.pretrain(bad)
    assert not (tmp_path / "run").exists()


def test_batches_of_a_schedule_must_be_shareable(images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.parallel, "start", lambda device: loop.parallel.World(0, 2, torch.device("cpu")))
    monkeypatch.setattr(loop.parallel, "finish", lambda world: None)
    with pytest.raises(UserError, match=r"progress.batch_sizes has 3, expected a multiple of 2 because 2 processes"):
        loop.pretrain(_recipe(images, tmp_path / "run"))


def test_without_a_schedule_fastmim_runs_as_any_method(images, tmp_path):
    loop.pretrain(tiny_fastmim(images, tmp_path / "run"))
    assert {line["img_size"] for line in read(tmp_path / "run/metrics.jsonl")} == {32}
