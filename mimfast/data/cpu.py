"""How many threads this process may keep busy: a container often has fewer than the machine shows."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_MAX_WORKERS = 16


def cpu_quota(cgroup_root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time that the control group (version 2 or 1) and those above it allow; None without a limit."""
    groups = control_groups("cpu", cgroup_root, membership)
    quotas = [_quota_v2(folder) if version == 2 else _quota_v1(folder) for version, folder in groups]
    return min((quota for quota in quotas if quota is not None), default=None)


def control_groups(
    controller: str, cgroup_root: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> Iterator[tuple[int, Path]]:
    """(version 1 or 2, folder) of this process's control group and of those above it, for "cpu" or "memory"."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = cgroup_root / controllers if controllers else cgroup_root
        if controllers and not base.is_dir():
            base = cgroup_root / controller
        folder = base / group.lstrip("/")
        # A container may see its own group as the root of the tree, so folders that do not exist are passed over.
        while True:
            yield (1 if controllers else 2), folder
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return None if limit <= 0 else limit / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def usable_cpus() -> float:
    """The smaller of the CPUs this process is bound to and its control group's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return float(bound) if quota is None else min(float(bound), quota)


def default_workers() -> int:
    """Loader threads for this machine: one per usable CPU, 1 to 16. More than that oversubscribes and gets slower."""
    return max(1, min(_MAX_WORKERS, int(usable_cpus())))
