"""How an implementation is chosen, what counts as verified, and what `status` says."""

import hashlib
import json

import pytest
import torch

from mimfast._check import UserError
from mimfast.ops import _choice
from mimfast.ops._choice import resolve, status, why_not_auto, why_not_on, why_not_verified


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """A package folder with one Triton kernel and a record of it; returns a function that rewrites the kernel."""
    kernel = tmp_path / "kernels" / "blur.py"
    kernel.parent.mkdir()
    kernel.write_text("first")
    record = {"sources": hashlib.sha256(b"first").hexdigest(), "device": "a GPU", "record": "bench/results/a.json"}
    (tmp_path / "verified.json").write_text(json.dumps({"blur": {"triton": record}}))
    monkeypatch.setattr(_choice, "PACKAGE", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    caches = (_choice.source_hash, _choice.verified)
    for c in caches:
        c.cache_clear()
    yield lambda text: (kernel.write_text(text), _choice.source_hash.cache_clear())
    for c in caches:
        c.cache_clear()


def test_auto_takes_the_first_that_can_and_is_verified(verified):  # noqa: ARG001
    asked = []

    def why_not(impl):
        asked.append(impl)
        return "no" if impl == "cpu" else None

    assert resolve("blur", "auto", ("cuda", "cpu", "triton", "ref"), why_not) == "triton"
    assert asked == ["cuda", "cpu", "triton"]


def test_auto_passes_over_what_is_not_verified(verified):
    order = ("triton", "ref")
    assert resolve("other", "auto", order, lambda _: None) == "ref"
    assert why_not_verified("other", "triton") == "no record of its tests passing on a GPU"
    verified("second")
    assert resolve("blur", "auto", order, lambda _: None) == "ref"
    assert why_not_verified("blur", "triton") == "its sources changed since bench/results/a.json was made"


def test_what_a_kernel_imports_is_part_of_it(verified):
    shared, other = (_choice.PACKAGE / "kernels" / f"{name}.py" for name in ("shared", "deeper"))
    shared.write_text("import os\nfrom mimfast.kernels.deeper import x\n")
    other.write_text("from mimfast.kernels.shared import y\n")
    hashes = []
    for text in ("first", "from mimfast.kernels.shared import (", "from mimfast.kernels.absent import z"):
        verified(text)
        hashes.append(_choice.source_hash("blur", "triton"))
    verified("from mimfast.kernels.shared import (")
    assert _choice.source_hash("blur", "triton") == hashes[1]
    other.write_text("changed")
    _choice.source_hash.cache_clear()
    hashes.append(_choice.source_hash("blur", "triton"))
    assert len(set(hashes)) == 4
    assert _choice.source_hash("absent", "triton") is None


def test_auto_never_takes_the_interpreter(verified, monkeypatch):  # noqa: ARG001
    assert why_not_auto("blur", "triton") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not_auto("blur", "triton") == "Triton's interpreter is for tests"


def test_native_cpu_code_needs_no_record():
    assert why_not_verified("blur", "cpu") is None


def test_an_explicit_choice_runs_or_raises():
    assert resolve("blur", "triton", ("triton", "ref"), lambda _: None) == "triton"
    assert resolve("blur", "ref", ("triton", "ref"), lambda _: "never asked") == "ref"
    with pytest.raises(UserError, match=r"^blur: impl has 'triton', expected .* because it is Sunday$"):
        resolve("blur", "triton", ("triton", "ref"), lambda _: "it is Sunday")
    with pytest.raises(UserError, match=r"impl has 'fast', expected one of 'auto', 'triton', 'ref' because"):
        resolve("blur", "fast", ("triton", "ref"), lambda _: None)


def test_reasons_name_the_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "these are on 'cpu'" in why_not_on("triton", "cpu")
    assert "these are on 'cpu'" in why_not_on("cuda", "cpu")
    assert "these are on 'cuda'" in why_not_on("cpu", "cuda")
    assert why_not_on("ref", "cpu") is None


def test_status_covers_every_implementation(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rows = {row.impl: row for row in status("noop")}
    assert list(rows) == ["cuda", "triton", "cpu", "ref"]
    assert rows["ref"] == ("ref", "in auto", "")
    assert all(row.reason for row in rows.values() if row.state != "in auto")
    if not torch.cuda.is_available():
        assert rows["triton"] == ("triton", "off", "no CUDA device")
