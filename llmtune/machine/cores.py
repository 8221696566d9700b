"""The CPU cores of this machine."""

import os


def count_cores() -> int:
    """Count the CPU cores that this process may use: all where the system, as macOS, does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
