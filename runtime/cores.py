"""The cores that this process may use."""

import os
from pathlib import Path


def available_cores() -> int:
    """Cores available to this process: its CPU affinity, limited by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cpu_quota() or cores))


def cpu_quota() -> int | None:
    """The container's CPU quota, in cores; a fraction of a core counts as one. None: it has no quota."""
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # "max": no quota
    except (OSError, ValueError):
        return None
    return -(-quota // period)
