"""Runs that keep their images in memory: the same weights as without, told at the start, refused when they cannot."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimfast._check import UserError
from mimfast.data import resident
from mimfast.data.memory import Memory
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder
from mimfast.settings import override, read_toml
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import loop
from mimfast.train.metrics import read


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def store(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    prep(Folder(images), path, PrepConfig(size=20), origin="test", workers=1)
    return path


def run(data, out, **changes):
    """Six steps of four of ten images: (losses, weights)."""
    recipe = tiny_recipe(data, out)
    loop.pretrain(replace(recipe, data=replace(recipe.data, **changes)))
    losses = [(line["step"], line["loss"]) for line in read(out / "metrics.jsonl")]
    return losses, load_file(out / "checkpoints/step_00000006/model.safetensors")


def assert_same(first, second):
    assert first[0] == second[0]
    for name, weights in first[1].items():
        assert torch.equal(weights, second[1][name]), name


def test_a_store_in_memory(store, tmp_path, capsys):
    plain = run(store, tmp_path / "plain")
    capsys.readouterr()
    assert_same(plain, run(store, tmp_path / "host", cache="host", workers=2))
    assert "cache: 10 images x 1 200 B = 12.0 kB, " in capsys.readouterr().out
    resolved = read_toml(tmp_path / "host" / "config.toml")
    assert (resolved["data.cache"], resolved["data.cache_side"]) == ("host", "none")


def test_copies_of_any_source(images, tmp_path):
    plain = run(images, tmp_path / "plain")
    copies = run(images, tmp_path / "copies", cache_side=12)
    assert plain[0] != copies[0]
    assert_same(copies, run(images, tmp_path / "host", cache="host", cache_side=12, workers=2))


def test_resume_begins_with_an_empty_cache(store, tmp_path):
    whole = run(store, tmp_path / "whole", cache="host", cache_side=12)
    recipe = tiny_recipe(store, tmp_path / "part", steps=6)
    recipe = override(recipe, {"data.cache": "host", "data.cache_side": 12, "train.checkpoint_steps": 2}, "test")
    loop.pretrain(recipe)
    for later in (tmp_path / "part" / "checkpoints").glob("step_0000000[56]*"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    assert loop.pretrain(recipe, resume=True).step == 6
    weights = load_file(tmp_path / "part" / "checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(weights[name], whole[1][name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "gpu"}, "data.cache has 'gpu', expected 'none' or 'host' because the run is on cpu"),
        ({"cache": "host"}, "expected 'none' because 10 images x 1 728 B = 17.3 kB, 1.0 GB free here, of which"),
        ({"cache": "host", "cache_side": 16}, "expected 'none' because 10 images x 768 B"),
    ],
)
def test_what_cannot_be_leaves_nothing_behind(tmp_path, monkeypatch, changes, message):
    root = tmp_path / "store"
    prep(Folder(write_images(tmp_path / "images")), root, PrepConfig(format="raw"), origin="test", workers=1)
    monkeypatch.setattr(resident, "host_memory", lambda: Memory("here", 10**9, 10**9, "others"))
    with pytest.raises(UserError) as caught:
        run(root, tmp_path / "run", **changes)
    assert message in str(caught.value)
    assert not Path(tmp_path / "run").exists()


def test_a_folder_needs_copies(images, tmp_path):
    with pytest.raises(UserError, match=r"sizes are not known before they are read, expected data\.cache_side"):
        run(images, tmp_path / "run", cache="host")
    assert not (tmp_path / "run").exists()
