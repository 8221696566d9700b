"""A command as a person starts it: its seconds from start to exit, its processor time, and the most memory it took."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil  # type: ignore[import-untyped]

INTERVAL = 0.5
"""Seconds between two looks at the memory of all processes."""
UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ru_maxrss."""


@dataclass(frozen=True)
class Measured:
    """What a command took: seconds, processor seconds and MiB at its peak; with its exit code and its last line."""

    code: int
    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    last_line: str

    @property
    def error(self) -> str:
        """Why it failed, in one line."""
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"{how}: {self.last_line}" if self.last_line else how


def measure(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Measured:
    """Run a command to its end, its output in `folder`; where this process is interrupted, the command ends too.

    Memory counts every process that the command starts. What they hold together is looked at twice a second, and pages
    of files that they share count once; the system's own figure for the largest one catches what lies between.
    """
    output = folder / "output.txt"
    with output.open("w") as file:
        began = perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        watch = _Watch(process.pid)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            wall = perf_counter() - began
            watch.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = output.read_text(errors="replace").strip().splitlines()
    # Linux counts what the parent held as the peak of a process that it starts, until that holds more itself.
    largest = usage.ru_maxrss if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss else 0
    peak = max(watch.peak, largest * UNIT) / 2**20
    cpu = float(usage.ru_utime + usage.ru_stime)
    return Measured(process.returncode, wall, cpu, peak, lines[-1] if lines else "")


class _Watch(threading.Thread):
    """Looks at the memory of a process and of all below it, and keeps the most bytes that they held together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stop_asked, self.peak = pid, threading.Event(), 0

    def run(self) -> None:
        while not self._stop_asked.wait(INTERVAL):
            self.peak = max(self.peak, bytes_together(self._pid))

    def stop(self) -> None:
        """End the looking."""
        self._stop_asked.set()
        self.join()


def bytes_together(pid: int) -> int:
    """The bytes that a process and all below it hold now; of pages that belong to files, those of the one with most."""
    own, shared = 0, 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        files = getattr(memory, "shared", 0)
        own, shared = own + memory.rss - files, max(shared, files)
    return own + shared
