"""What this process may use of the machine: processors and memory, by its affinity and by the limits of its container
(control groups, version 1 and 2). Only the standard library is imported here."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # another one in tests
UNLIMITED = 1 << 60  # version 1 writes no limit as a number near 2^63


def cores() -> int:
    """Processors that this process may use: those of its affinity, or fewer where a quota of processor time is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota == math.inf else max(1, min(allowed, math.ceil(quota)))


def cpu_quota() -> float:
    """The processors' worth of time that the container grants; infinite without a limit."""
    found = [math.inf]
    for folder in _folders("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                found.append(quota / int((folder / "cpu.cfs_period_us").read_text()))
    return min(found)


def available_memory() -> float:
    """Bytes that can still be taken: what the machine has, or less where the container's limit is nearer. Infinite where
    the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(OSError):
        told = re.search(r"MemAvailable:\s+(\d+) kB", (ROOT / "proc/meminfo").read_text())
        found += [1024 * int(told[1])] if told else []
    for folder in _folders("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())
                if most < UNLIMITED:
                    found.append(most - int((folder / usage).read_text()) + _file_cache(folder))
    return max(0, min(found))


def _file_cache(folder: Path) -> int:
    """Bytes of a memory group that hold files that were read: they are given up when memory is short."""
    with contextlib.suppress(OSError):
        told = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
        return int(told[1]) if told else 0
    return 0


def _folders(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, from its own up to the root: within a container some of
    their paths are those of the host, and only the root is there."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"] if controllers else ["sys/fs/cgroup"]
        for mount in dict.fromkeys(mounts):
            own = Path(path.lstrip("/"))
            for part in (own, *own.parents):
                if (folder := ROOT / mount / part).is_dir():
                    yield folder
