"""Counts the CPUs that this process may use: by its affinity and its cgroup's quota, not by the host.

Also reads the flags of the CPU, which name its instructions.
"""

import os
from pathlib import Path

MAX_THREADS = 1024
"""The most threads that a caller may ask for."""

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC_CGROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
_NODES = Path("/sys/devices/system/node")


def available_cpus(*, cgroup_root: Path = _CGROUP_ROOT, proc_cgroup: Path = _PROC_CGROUP) -> int:
    """CPUs in the affinity mask, bounded by the CPU quota of the cgroup (version 1 or 2) and of its parents.

    A fraction is rounded down, to at least 1: with more threads than the quota, all stop for the rest of each period.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    quota = _cgroup_quota(cgroup_root, proc_cgroup)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_flags() -> tuple[str, ...]:
    """Linux's flags of the CPU, such as "avx2"; empty if the system does not tell them."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    # "Features" on Arm.
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith(("flags", "Features")))
    return tuple(next(lines, "").split())


def numa_nodes(*, folder: Path = _NODES) -> int:
    """The number of NUMA nodes with a CPU in the affinity mask; 1 where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return 1
    usable = os.sched_getaffinity(0)
    lists = [_fields(file) for file in folder.glob("node*/cpulist")]
    return max(1, sum(any(usable & _cpus(span) for span in fields[0].split(",")) for fields in lists if fields))


def _cpus(span: str) -> set[int]:
    """The CPUs of a span as Linux writes it, such as "7" or "0-3"."""
    first, _, last = span.partition("-")
    return set(range(int(first), int(last or first) + 1))


def _cgroup_quota(root: Path, proc_cgroup: Path) -> float | None:
    try:
        lines = proc_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += [_quota_v2(folder) for folder in _with_parents(root, path)]
        elif "cpu" in controllers.split(","):
            for mount in (root / controllers, root / "cpu"):
                quotas += [_quota_v1(folder) for folder in _with_parents(mount, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_parents(mount: Path, path: str) -> list[Path]:
    """The folders of a cgroup and of its parents. Inside a container often only the mount itself exists."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]


def _quota_v2(folder: Path) -> float | None:
    fields = _fields(folder / "cpu.max")
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(folder: Path) -> float | None:
    quota, period = _fields(folder / "cpu.cfs_quota_us"), _fields(folder / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
