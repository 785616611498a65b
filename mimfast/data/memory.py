"""How many bytes of memory a cache may take: what is free on this machine, or on its GPU, less what others need."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from mimfast.data.cpu import CGROUPS, MEMBERSHIP, control_groups

_MEMINFO = Path("/proc/meminfo")
_LEAST_ROOM = 1 << 30


class Memory(NamedTuple):
    """place: its name in sentences. free: bytes that nobody holds. room: the part of them that must stay free, and
    `what_for`."""

    place: str
    free: int
    room: int
    what_for: str

    @property
    def usable(self) -> int:
        return max(0, self.free - self.room)


def host_memory(meminfo: Path = _MEMINFO, cgroup_root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Memory:
    """Memory of the machine, or of the control group of this process when that allows less.

    An eighth of it, 1 GiB at least, stays free: for the network and the batches of this process, and for the system's
    own cache of the files that the first epoch reads.
    """
    total, free = installed, _ = _machine(meminfo)
    for version, folder in control_groups("memory", cgroup_root, membership):
        limit, left = _group(version, folder)
        if limit is not None and limit < installed:
            total, free = min(total, limit), min(free, left)
    return Memory("in the memory of this machine", free, max(_LEAST_ROOM, total // 8), "the processes and the files")


def gpu_memory(device: torch.device) -> Memory:
    """Memory of a GPU as it is now.

    A quarter of the whole stays free for activations, gradients and the states of the optimizer, which come with the
    first step.
    """
    free, total = torch.cuda.mem_get_info(device)
    return Memory("on the GPU", free, total // 4, "the network")


def _machine(meminfo: Path) -> tuple[int, int]:
    """(total, free) bytes. Without /proc all that is installed counts as free."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, free = (1024 * int(lines[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
        return total, free
    except (OSError, ValueError, KeyError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62
        return total, total


def _group(version: int, folder: Path) -> tuple[int | None, int]:
    """(limit, bytes left below it) of a control group; pages of files that were not used lately count as left."""
    limit, used, idle = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    try:
        most = int((folder / limit).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most, max(0, most - int((folder / used).read_text()) + int(stat.get(idle, 0)))
    except (OSError, ValueError):
        return None, 0
