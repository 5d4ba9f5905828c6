"""Tests of fastrobust.runtime.limits: processors and memory of containers, from files laid out as the system does."""

import math

import pytest

from fastrobust.runtime import limits


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(path=text, ...) writes files below a made-up root; proc__self__cgroup stands for proc/self/cgroup."""
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def make(files: dict[str, str]):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return make


V2 = {"proc/self/cgroup": "0::/user/job\n"}
V1 = {"proc/self/cgroup": "3:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n1:cpuset:/\n"}


def test_without_limits(system):
    system({})
    assert limits.cores() == 8 and limits.cpu_quota() == math.inf and limits.available_memory() == math.inf


@pytest.mark.parametrize(
    ("quota", "cores"), [("50000 100000", 1), ("150000 100000", 2), ("800000 100000", 8), ("max 100000", 8)]
)
def test_quota_of_version_2(system, quota, cores):
    system(V2 | {"sys/fs/cgroup/user/job/cpu.max": quota})
    assert limits.cores() == cores


def test_the_least_of_a_group_and_its_parents_counts(system):
    system(V2 | {"sys/fs/cgroup/user/job/cpu.max": "400000 100000", "sys/fs/cgroup/user/cpu.max": "250000 100000"})
    assert limits.cpu_quota() == 2.5 and limits.cores() == 3


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("50000", 1), ("350000", 4)])
def test_quota_of_version_1(system, quota, cores):
    folder = "sys/fs/cgroup/cpu,cpuacct/docker/x"
    system(V1 | {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"})
    assert limits.cores() == cores


def test_within_a_container_the_hosts_path_is_not_there(system):
    root = "sys/fs/cgroup/cpu,cpuacct"
    system(V1 | {f"{root}/cpu.cfs_quota_us": "100000", f"{root}/cpu.cfs_period_us": "100000"})
    assert limits.cores() == 1


def test_memory(system):
    system({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"})
    assert limits.available_memory() == 4000 * 1024


def test_memory_of_version_2(system):
    system(V2 | {"proc/meminfo": "MemAvailable: 9000000 kB\n", "sys/fs/cgroup/user/job/memory.max": "1000000"})
    system(
        {"sys/fs/cgroup/user/job/memory.current": "700000", "sys/fs/cgroup/user/job/memory.stat": "inactive_file 50000\n"}
    )
    assert limits.available_memory() == 1000000 - 700000 + 50000
    system({"sys/fs/cgroup/user/job/memory.max": "max"})
    assert limits.available_memory() == 9000000 * 1024


def test_memory_of_version_1(system):
    folder = "sys/fs/cgroup/memory/docker/x"
    system(V1 | {f"{folder}/memory.limit_in_bytes": "500000", f"{folder}/memory.usage_in_bytes": "600000"})
    assert limits.available_memory() == 0
    system({f"{folder}/memory.limit_in_bytes": "9223372036854771712"})
    assert limits.available_memory() == math.inf
