"""A run killed at random instants, inside a checkpoint included, ends as if nobody had touched it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mimfast.settings import to_toml
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import checkpoint, loop

PACKAGE = Path(__file__).resolve().parents[2]
STEPS = 60
RUN = (
    "import sys\nfrom mimfast import recipes, settings\nfrom mimfast.train.loop import pretrain\n"
    "recipe = settings.override(recipes.mae_photos(), settings.read_toml(sys.argv[1]), 'file')\n"
    "pretrain(recipe, resume=sys.argv[2] == 'resume')\n"
)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_kill_minus_nine_at_random_instants(tmp_path):
    images = write_images(tmp_path / "images")
    whole = tiny_recipe(images, tmp_path / "whole", steps=STEPS, checkpoint_steps=1)
    loop.pretrain(whole)

    out = tmp_path / "killed"
    config = tmp_path / "config.toml"
    config.write_text(to_toml(tiny_recipe(images, out, steps=STEPS, checkpoint_steps=1)))
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    chance, kills, started = random.Random(0), 0, False
    while True:
        command = [sys.executable, "-c", RUN, str(config), "resume" if started else "new"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        began = (out / "checkpoints" / "latest").stat().st_mtime_ns if started else 0
        while process.poll() is None and _unchanged(out, began):
            time.sleep(0.005)
        # a checkpoint a step: the instant falls into a step, into a save, or between the two
        time.sleep(chance.uniform(0, 0.2))
        if kills < 12 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, started = kills + 1, True
            continue
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        break
    assert kills >= 5, "the run ended before it was killed often enough to prove anything"
    wanted, found = losses(tmp_path / "whole"), losses(out)
    assert found == wanted
    newest = [checkpoint.newest(run / "checkpoints", print) for run in (tmp_path / "whole", out)]
    one, two = (load_file(folder / "model.safetensors") for folder in newest)
    assert all(one[name].equal(two[name]) for name in one)


def _unchanged(out: Path, began: int) -> bool:
    latest = out / "checkpoints" / "latest"
    return not latest.is_file() or latest.stat().st_mtime_ns == began
