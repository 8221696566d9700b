"""What a worker of a Ray cluster does for one task: the task's process, in a folder that every machine sees."""

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmtune.launch.command import CORES, training_environment
from llmtune.launch.process import Child
from llmtune.machine.gpus import VISIBLE

GRACE = 60.0
"""Seconds that a stopped task may take to save and end."""
POLL = 0.2
BUSY = ".task.lock"


def run_process(words: list[str], log: str, here: str, mark: str, cores: int, gpus: int) -> tuple[int, str]:
    """Run `python words...` in the folder `here` and give its exit code and the line that says why it failed.

    `mark` is a file of the command that sent the task: a machine without it has another disk.
    """
    if not Path(mark).is_file():
        return 3, f"{socket.gethostname()} has no {Path(mark).parent}; give an --out on a disk that all machines share"
    os.chdir(here)
    environment = training_environment(1, cores, gpus)
    # Ray gives a task one thread for each CPU that it reserves.
    environment |= {"OMP_NUM_THREADS": str(cores), CORES: str(cores)} | ({} if gpus else {VISIBLE: ""})
    with tempfile.TemporaryDirectory() as folder, _alone(Path(log).with_name(BUSY)) as lock:
        child = Child([sys.executable, *words], environment, Path(folder))
        with Path(log).open("ab") as output:
            child.start(output.fileno(), kept_open=(lock,))
        try:
            while not child.wait(POLL):
                pass
        except BaseException:  # Ray cancels a task as Ctrl-C does
            child.stop(1)
            child.wait(GRACE)
            child.stop(3)
            child.wait()
            raise
        ended = child.ended()
    return ended.code, ended.message


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[int]:
    """Wait until no other process of the task is alive; the task's own process keeps the lock if this one dies."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
