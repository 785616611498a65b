"""Two processes see together what one sees, learn the same, and only the first one writes and prints."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mimfast
from mimfast._check import UserError
from mimfast.settings import to_toml
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import loop, parallel
from mimfast.train.metrics import read

PACKAGE = Path(mimfast.__file__).parent.parent

# trains the configuration argv[1] and writes the sample ids of every step to argv[2] + rank
CODE = """
import json, os, sys
from mimfast import recipes, settings
from mimfast.train import loop
seen, real = [], loop._loss
def note(job, model, batch):
    seen.append(batch.sample_ids.tolist())
    return real(job, model, batch)
loop._loss = note
loop.pretrain(settings.override(recipes.mae_photos(), settings.read_toml(sys.argv[1]), "file"))
open(sys.argv[2] + os.environ["RANK"], "w").write(json.dumps(seen))
"""


def _run_ranks(config, ids, size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shared |= {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(config), str(ids)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    printed = [process.communicate(timeout=240)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * size
    return printed


def test_two_processes_equal_one(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images")
    alone, shared = tiny_recipe(images, tmp_path / "one"), tiny_recipe(images, tmp_path / "two")
    seen, real = [], loop._loss

    def note(job, model, batch):
        seen.append(batch.sample_ids.tolist())
        return real(job, model, batch)

    monkeypatch.setattr(loop, "_loss", note)
    loop.pretrain(alone)
    (tmp_path / "config.toml").write_text(to_toml(shared))
    printed = _run_ranks(tmp_path / "config.toml", tmp_path / "ids", 2)

    first, second = (json.loads((tmp_path / f"ids{rank}").read_text()) for rank in range(2))
    assert [a + b for a, b in zip(first, second)] == seen
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), key
    weights = [load_file(tmp_path / name / "checkpoints/step_00000006/model.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        # the key's bias has no effect on attention: its gradient is rounding noise, which Adam turns into steps
        if key.endswith("qkv.bias"):
            continue
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
    assert "fp32 on 2 x cpu" in printed[0]
    assert printed[1] == ""


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    recipe = tiny_recipe(write_images(tmp_path / "images"), tmp_path / "run")
    monkeypatch.setattr(parallel, "start", lambda device: parallel.World(0, 3, torch.device("cpu")))
    monkeypatch.setattr(parallel, "finish", lambda world: None)
    with pytest.raises(
        UserError, match=r"optim.batch_size has 4, expected a multiple of 3 because 3 processes share it"
    ):
        loop.pretrain(recipe)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "torch knows no such device"),
        ("mps", "expected auto, cpu, cuda or cuda:N"),
        ("cuda:99", "expected a device that exists because torch sees"),
    ],
)
def test_a_device_that_does_not_exist_is_named(tmp_path, device, message):
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        loop.pretrain(replace(recipe, train=replace(recipe.train, device=device)))
