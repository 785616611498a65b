"""`mimfast doctor` names every op and implementation with state and reason; it fails when the CPU path is broken."""

import pytest

from mimfast import doctor


def test_report_names_ops_reasons_and_works_on_this_cpu(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    for word in ("torch", "native core", "threads", "mask_plan", "pixel_loss", "CPU path: works"):
        assert word in out


def test_optional_packages_say_how_to_get_them(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "nothing (pip install 'mimfast[dali]')"})
    doctor.main()
    assert "not installed: nothing (pip install 'mimfast[dali]')" in capsys.readouterr().out


def test_exit_code_when_the_cpu_path_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_path_works", lambda: "RuntimeError: no")
    assert doctor.main() == 1
    assert "CPU path: broken: RuntimeError: no" in capsys.readouterr().out


def test_markdown_table_has_a_row_for_each_op(capsys):
    assert doctor.main(markdown_only=True) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| op | `ref` | `cpu` | `sdpa` | `triton` | `cuda` |"
    assert [row.split("`")[1] for row in rows[2:]] == doctor.op_names()


@pytest.mark.parametrize("op", doctor.op_names())
def test_every_gpu_state_has_a_reason(op):
    from mimfast.ops._choice import status

    for row in status(op):
        assert row.state in ("in auto", "by name only", "off")
        assert bool(row.reason) == (row.state != "in auto")
