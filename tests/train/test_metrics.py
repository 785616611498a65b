"""Numbers are read one interval late, skipped steps do not spoil means, and the file survives a kill."""

import json
import math

import pytest
import torch

from mimfast.data.clock import StageClock
from mimfast.train import metrics
from mimfast.train.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def _add(meter, loss, norm=1.0, skipped=0.0):
    meter.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(skipped), 8)


def test_a_line_comes_one_interval_late_with_the_means_of_its_own():
    meter = metrics.Meter(ALONE)
    _add(meter, 1.0, 2.0)
    _add(meter, 3.0, 4.0)
    assert meter.flush({"step": 2}) is None
    _add(meter, 10.0)
    line = meter.flush({"step": 3})
    assert (line["step"], line["loss"], line["grad_norm"]) == (2, 2.0, 3.0)
    assert (line["skipped"], line["stop"]) == (0, False)
    assert line["memory"] > 1e7
    assert meter.take()["loss"] == 10.0
    assert meter.take() is None


def test_a_skipped_step_counts_but_leaves_the_means_alone():
    meter = metrics.Meter(ALONE)
    _add(meter, 1.0)
    _add(meter, math.nan, math.inf, 1.0)
    _add(meter, math.nan, math.nan, 1.0)
    meter.flush({})
    line = meter.take()
    assert (line["loss"], line["grad_norm"]) == (1.0, 1.0)
    assert (line["skipped"], line["skipped_in_a_row"]) == (2, 2)
    _add(meter, 5.0)
    meter.flush({}, stop=True)
    line = meter.take()
    assert (line["skipped"], line["skipped_in_a_row"], line["stop"]) == (2, 0, True)


def test_an_open_interval_survives_save_and_restore():
    meter, other = metrics.Meter(ALONE), metrics.Meter(ALONE)
    _add(meter, 1.0)
    other.restore(meter.state())
    _add(other, 4.0)
    other.flush({})
    assert other.take()["loss"] == 2.5


def test_the_log_drops_what_lies_beyond_the_checkpoint_and_a_torn_line(tmp_path):
    log = metrics.Log(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": math.nan if step == 2 else 0.5})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    metrics.Log(tmp_path, tensorboard=False, after_step=2).close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_tensorboard_gets_the_numbers_when_it_is_there(tmp_path):
    pytest.importorskip("tensorboard")
    log = metrics.Log(tmp_path, tensorboard=True)
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_each_line_tells_where_the_time_of_the_loader_went():
    clock, meter = StageClock(), metrics.Meter(ALONE)
    clock.add("decode", 9.0)
    meter.watch(clock)
    _add(meter, 1.0)
    for stage, seconds in {"read": 0.25, "decode": 1.5, "crop": 0.5, "transfer": 0.125, "wait": 1e6}.items():
        clock.add(stage, seconds)
    meter.flush({})
    _add(meter, 1.0)
    clock.add("crop", 2.0)
    line = meter.flush({})
    found = [line[f"data_{stage}_s"] for stage in ("read", "decode", "crop", "transfer")]
    assert found == [0.25, 1.5, 0.5, 0.125]
    assert line["data_wait"] == 1.0
    line = meter.take()
    assert [line[f"data_{stage}_s"] for stage in ("read", "decode", "crop", "transfer")] == [0, 0, 2.0, 0]
    assert line["data_wait"] == 0
