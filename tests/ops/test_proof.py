"""The proof machinery can say no: the tolerance rule, poison, races, records, budgets."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

from mimfast._check import fail
from mimfast.testing import assert_close_to_ref, poisoned, race
from mimfast.testing.bench import Bench, run_case

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name):
    """A script of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scaled(factor):
    def fn(x):
        return x.sin() * factor

    return fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_rule(dtype):
    args = {"x": torch.randn(100).to(dtype).requires_grad_()}
    errors = assert_close_to_ref(scaled(1.0), scaled(1.0), args)
    assert [e.name for e in errors] == ["output", "gradient of x"]
    with pytest.raises(AssertionError, match="output"):
        assert_close_to_ref(scaled(1 + 16 * torch.finfo(dtype).eps), scaled(1.0), args)
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_ref(scaled(float("nan")), scaled(1.0), args)


def test_a_wrong_gradient_alone_is_seen():
    def detached(x):
        return x.sin().detach() + 0 * x

    with pytest.raises(AssertionError, match="gradient of x"):
        assert_close_to_ref(detached, scaled(1.0), {"x": torch.randn(10, requires_grad=True)})


def test_poison_shows_unwritten_memory_and_ends():
    with poisoned():
        assert torch.empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_race_takes_turns():
    order = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ab" + "ababab"
    assert times["a"].rounds == 3
    assert times["a"].median_us <= times["a"].p95_us


def record(**changes):
    tests = {
        "tests/ops/test_blur.py::test_value[case-triton]": "passed",
        "tests/ops/test_other.py::test_x[triton]": "failed",
    }
    row = {"contestant": "triton", "out_of_tolerance": False}
    stages = [{"tests": tests}, {"op": "blur", "rows": [row]}]
    base = {
        "dry_run": False,
        "machine": {"device": "NVIDIA H200"},
        "sources": {"blur": {"triton": "abc"}},
        "stages": stages,
    }
    return base | changes


def test_a_record_verifies_only_what_it_shows():
    why_not = load("verify_record").why_not
    assert why_not(record(), "blur", "triton", "abc") is None
    assert "not those of the record" in why_not(record(), "blur", "triton", "abd")
    assert "not made on a GPU" in why_not(record(dry_run=True), "blur", "triton", "abc")
    assert "not made on a GPU" in why_not(record(machine={"device": "cpu"}), "blur", "triton", "abc")
    failed = {"tests": {"tests/ops/test_blur.py::test_value[case-triton]": "failed"}}
    assert "1 tests failed" in why_not(record(stages=[failed]), "blur", "triton", "abc")
    skipped = {"tests": {"tests/ops/test_blur.py::test_value[case-triton]": "skipped"}}
    assert "no test naming it passed" in why_not(record(stages=[skipped]), "blur", "triton", "abc")
    apart = {"tests": {"tests/ops/test_blur_cuda.py::test_value[cuda-case]": "failed"}}
    assert "1 tests failed" in why_not(record(sources={"blur": {"cuda": "abc"}}, stages=[apart]), "blur", "cuda", "abc")
    assert why_not(record(stages=[*record()["stages"], apart]), "blur", "triton", "abc") is None
    loose = {"op": "blur", "rows": [{"contestant": "triton", "out_of_tolerance": True}]}
    assert "out of tolerance" in why_not(record(stages=[*record()["stages"], loose]), "blur", "triton", "abc")


def test_a_race_goes_on_without_what_refuses_a_case(capsys):
    def refuse(x):  # noqa: ARG001
        fail("blur", "x", "1", "2", "it is a test")

    bench = Bench(
        "blur", [1], lambda *_: {"x": torch.ones(3, requires_grad=True)}, torch.square,
        lambda _: {"ours": torch.square, "other": refuse}, lambda *_: 12, "ours",
    )  # fmt: skip
    rows = run_case(bench, 1, "cpu", 2)
    assert {row["contestant"] for row in rows} == {"ours"}
    assert "other: refused: blur: x has 1, expected 2" in capsys.readouterr().out


def test_a_stage_that_fails_hangs_or_is_missing_does_not_stop_the_suite(tmp_path):
    suite = load("gpu_suite")
    report = tmp_path / "tests.xml"
    bad = tmp_path / "test_bad.py"
    bad.write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    pytest_command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
        str(bad),
    ]
    soon = time.monotonic() + 100
    with open(tmp_path / "log", "w+") as log:
        failed = suite.run(suite.Stage("tests", pytest_command, 60, report), soon, log)
        hung = suite.run(suite.Stage("hangs", ["sleep", "60"], 1), soon, log)
        missing = suite.run(suite.Stage("missing", ["no-such-command"], 1), soon, log)
        late = suite.run(suite.Stage("late", ["true"], 1), time.monotonic(), log)
        fine = suite.run(suite.Stage("fine", ["true"], 10), soon, log)
    assert failed["outcome"] == "failed"
    assert failed["why"] == "exit code 1"
    assert sorted(failed["tests"].values()) == ["failed", "passed"]
    assert "assert 0" in failed["tail"]
    assert hung["why"] == "stopped after 1 s"
    assert "no-such-command" in missing["why"]
    assert "no time left" in late["why"]
    assert fine["outcome"] == "passed"


def test_budget_names_what_is_too_much():
    aot = load("aot_triton")
    budget = {"registers": 32, "shared": 64}
    assert aot.over_budget(aot.Use(32, 0, 64), budget) == []
    assert aot.over_budget(aot.Use(40, 8, 64), budget) == ["8 bytes spilled, expected 0", "registers 40, budget 32"]
    assert "no budget" in aot.over_budget(aot.Use(1, 0, 0), None)[0]
    assert aot.loosest({"3.6": {"k": {"registers": 32, "shared": 9}}, "3.9": {"k": budget}})["k"] == {
        "registers": 40,
        "shared": 64,
    }
