"""CPUs of the process, with cgroup trees made by hand."""

import os

import pytest

from gte_deploy.core.cpus import available_cpus, numa_nodes


@pytest.fixture
def four_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


def cgroup(tmp_path, lines, files):
    (tmp_path / "proc").write_text(lines)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return {"cgroup_root": tmp_path / "cgroup", "proc_cgroup": tmp_path / "proc"}


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("lines", "files", "cpus"),
    [
        ("0::/\n", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "900000 100000\n"}, 4),
        # Limits nest: the parent's counts too, and inside a container only the mount exists.
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 1),
        ("0::/host/path\n", {"cpu.max": "300000 100000\n"}, 3),
        # Version 1.
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_quota(tmp_path, lines, files, cpus):
    assert available_cpus(**cgroup(tmp_path, lines, files)) == cpus


def test_affinity_without_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert available_cpus(cgroup_root=tmp_path, proc_cgroup=tmp_path / "none") == 1


def test_here():
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("four_cpus")
@pytest.mark.parametrize(
    ("lists", "nodes"),
    [
        ({}, 1),
        ({"node0": "0-3\n"}, 1),
        ({"node0": "0-1\n", "node1": "2-3\n"}, 2),
        ({"node0": "0,8\n", "node1": "1,9\n", "node2": "2-3,10-11\n", "node3": "4-7\n"}, 3),  # no CPU of the last
        ({"node0": "0-63\n", "node1": "\n"}, 1),  # a node with memory alone
    ],
)
def test_numa_nodes(tmp_path, lists, nodes):
    for name, cpus in lists.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cpus)
    assert numa_nodes(folder=tmp_path) == nodes
