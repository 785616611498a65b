"""A whole run of every method on every kind of encoder: trained, measured in its own way, saved and loaded again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import mimfast
from mimfast.recipes import Masking, Model, Progress, Target
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import loop
from mimfast.train.metrics import read

RAW = Target(norm=False, kind="l1")
DROPPING = {"model": Model("simmim", "beit_nano", 64, drop_path=0.3), "target": RAW, "mask": Masking(0.6, 16)}
CASES = {
    "fastmim vit": ({"model": Model("fastmim", "vit_nano8", 64, drop_last=2), "mask": Masking(block=16)}, "ViT", "hog"),
    "fastmim swin, cells": ({"model": Model("fastmim", "swin_nano", 64), "mask": Masking(block=8)}, "Swin", "hog"),
    "fastmim timm": ({"model": Model("fastmim", "timm:pvt_v2_b0", 64)}, "Timm", "hog"),
    "fastmim pixels": (
        {"model": Model("fastmim", "vit_nano8", 64), "target": Target(what="pixels")},
        "ViT",
        "reconstruction",
    ),
    "simmim swin": ({"model": Model("simmim", "swin_nano", 64), "target": RAW}, "Swin", "reconstruction"),
    "simmim beit": (DROPPING, "BEiT", "reconstruction"),
    "simmim local": (
        {"model": Model("simmim", "swin_nano", 64), "target": replace(RAW, what="local")},
        "Swin",
        "loss",
    ),
    "maskfeat": ({"model": Model("maskfeat", "vit_nano8", 64), "mask": Masking(0.4)}, "ViT", "hog"),
    "mixmim": (
        {
            "model": Model("mixmim", "mixswin_nano", 64, decoder_depth=1),
            "target": Target(norm=False),
            "mask": Masking(0.5),
        },
        "MixSwin",
        "reconstruction",
    ),
    "greenmim": (
        {
            "model": Model("greenmim", "swin_nano", 128, decoder_dim=32),
            "target": Target(norm=False),
            "mask": Masking(0.5),
        },
        "Swin",
        "reconstruction",
    ),
    "growing swin": (
        {"model": Model("fastmim", "swin_nano", 96), "mask": Masking(block=32), "progress": Progress((64, 96))},
        "Swin",
        "hog",
    ),
    "growing timm": (
        {"model": Model("fastmim", "timm:pvt_v2_b0", 96), "progress": Progress((64, 96), (6, 2))},
        "Timm",
        "hog",
    ),
    "growing beit": ({**DROPPING, "progress": Progress((32, 64))}, "BEiT", "reconstruction"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), side=72)


def _recipe(images, out, given, **train):
    return replace(tiny_recipe(images, out, **train), **{"target": Target(), **given})


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_every_kind(images, tmp_path, capsys, case):
    given, encoder, result = CASES[case]
    recipe = _recipe(images, tmp_path / "run", given, steps=2)
    assert loop.pretrain(recipe).step == 2
    out = tmp_path / "run"
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in read(out / "metrics.jsonl"))
    found = json.loads((out / "results.json").read_text())[result]
    errors = found["loss" if result == "loss" else "mse"]
    assert errors.pop("model") > 0
    assert all(value > 0 for value in errors.values())
    assert result == "loss" or (out / f"{result}.png").exists()
    assert "held-out images" in capsys.readouterr().out
    loaded = mimfast.load(out / "encoder.safetensors")
    method = mimfast.load(out / "checkpoints/step_00000002/model.safetensors")
    assert (type(loaded).__name__, type(method).__name__.lower()) == (encoder, recipe.model.method)
    weights = method.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items() if name in weights)


@pytest.mark.parametrize("case", ["simmim beit", "growing beit"])
def test_resume_repeats_dropped_branches(images, tmp_path, case):
    given = CASES[case][0]
    loop.pretrain(_recipe(images, tmp_path / "whole", given, checkpoint_steps=3))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken", ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000006")
    loop.pretrain(_recipe(images, tmp_path / "broken", given, checkpoint_steps=3), resume=True)
    one, two = (load_file(tmp_path / f"{name}/checkpoints/step_00000006/model.safetensors") for name in
                ("whole", "broken"))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[line["loss"] for line in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken")]
    assert losses[0] == losses[1]
