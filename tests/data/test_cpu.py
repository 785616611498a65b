import os

import pytest

from mimfast.data import cpu


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("limit", "wanted"), [("150000 100000", 1.5), ("max 100000", None), ("garbage", None)])
def test_quota_of_version_2(tmp_path, limit, wanted):
    write(tmp_path / "member", "0::/app/job\n")
    write(tmp_path / "app" / "job" / "cpu.max", limit)
    write(tmp_path / "app" / "cpu.max", "max 100000")
    assert cpu.cpu_quota(tmp_path, tmp_path / "member") == wanted


def test_smallest_quota_on_the_way_up(tmp_path):
    write(tmp_path / "member", "0::/app/job\n")
    write(tmp_path / "app" / "job" / "cpu.max", "400000 100000")
    write(tmp_path / "app" / "cpu.max", "200000 100000")
    assert cpu.cpu_quota(tmp_path, tmp_path / "member") == 2.0


def test_container_that_sees_its_own_group_as_the_root(tmp_path):
    write(tmp_path / "member", "0::/kubepods/unknown\n")
    write(tmp_path / "cpu.max", "50000 100000")
    assert cpu.cpu_quota(tmp_path, tmp_path / "member") == 0.5


@pytest.mark.parametrize(("limit", "wanted"), [("300000", 3.0), ("-1", None)])
def test_quota_of_version_1(tmp_path, limit, wanted):
    write(tmp_path / "member", "4:cpu,cpuacct:/job\n3:memory:/job\n")
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", limit)
    write(tmp_path / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    assert cpu.cpu_quota(tmp_path, tmp_path / "member") == wanted


def test_no_control_groups(tmp_path):
    assert cpu.cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "wanted"), [(None, None), (0.5, 1), (2.9, 2), (1000.0, None)])
def test_default_workers(monkeypatch, quota, wanted):
    monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert cpu.default_workers() == (wanted or 16)
    assert cpu.usable_cpus() == min(64.0, quota or 64.0)
