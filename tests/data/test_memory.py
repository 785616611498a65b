"""How much memory a cache may take, from files as Linux shows them."""

import pytest

from mimfast.data.memory import Memory, host_memory

GIB = 1 << 30


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


@pytest.fixture
def machine(tmp_path):
    """A machine of 64 GiB, of which 40 are free; returns what `host_memory` says of it."""
    write(tmp_path / "meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB\nHugePages: 0\n")

    def look(membership="0::/job\n"):
        write(tmp_path / "member", membership)
        return host_memory(tmp_path / "meminfo", tmp_path, tmp_path / "member")

    return look


def test_without_a_limit(machine):
    found = machine()
    assert (found.free, found.room) == (40 * GIB, 8 * GIB)
    assert found.usable == 32 * GIB


def test_limit_of_version_2_less_what_is_used(machine, tmp_path):
    write(tmp_path / "job" / "memory.max", 24 * GIB)
    write(tmp_path / "job" / "memory.current", 10 * GIB)
    write(tmp_path / "job" / "memory.stat", f"anon {5 * GIB}\ninactive_file {3 * GIB}\n")
    assert machine()[1:3] == (17 * GIB, 3 * GIB)


def test_the_tightest_group_on_the_way_up(machine, tmp_path):
    for folder, limit in (("a", 16 * GIB), ("a/b", "max"), ("a/b/c", 20 * GIB)):
        write(tmp_path / folder / "memory.max", limit)
        write(tmp_path / folder / "memory.current", 4 * GIB)
        write(tmp_path / folder / "memory.stat", "inactive_file 0\n")
    assert machine("0::/a/b/c\n")[1:3] == (12 * GIB, 2 * GIB)


def test_limit_of_version_1(machine, tmp_path):
    write(tmp_path / "memory" / "job" / "memory.limit_in_bytes", 32 * GIB)
    write(tmp_path / "memory" / "job" / "memory.usage_in_bytes", 30 * GIB)
    write(tmp_path / "memory" / "job" / "memory.stat", f"total_inactive_file {6 * GIB}\n")
    assert machine("3:cpu:/x\n4:memory:/job\n")[1:3] == (8 * GIB, 4 * GIB)


def test_a_limit_above_the_machine_is_none(machine, tmp_path):
    write(tmp_path / "memory" / "memory.limit_in_bytes", 2**63 - 4096)
    write(tmp_path / "memory" / "memory.usage_in_bytes", 60 * GIB)
    write(tmp_path / "memory" / "memory.stat", "total_inactive_file 0\n")
    assert machine("4:memory:/\n")[1:3] == (40 * GIB, 8 * GIB)


def test_less_than_stays_free_is_nothing(tmp_path):
    write(tmp_path / "meminfo", "MemTotal: 2097152 kB\nMemAvailable: 1000 kB\n")
    found = host_memory(tmp_path / "meminfo", tmp_path, tmp_path / "none")
    assert (found.room, found.usable) == (GIB, 0)


def test_without_proc_all_that_is_installed_is_free(tmp_path):
    found = host_memory(tmp_path / "none", tmp_path, tmp_path / "none")
    assert found.free > GIB
    assert isinstance(found, Memory)
