"""Tasks as child processes of this one: one after another, or side by side with GPUs of their own."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from llmtune.errors import MachineError
from llmtune.launch.command import child_environment
from llmtune.launch.process import Child
from llmtune.launch.signals import handling, heeded
from llmtune.machine.cores import count_cores
from llmtune.machine.gpus import find_gpus, name_gpus, visibility
from llmtune.pool.endings import Stops, ended_as, was_stopped
from llmtune.pool.task import Ended, Task, log_file

POLL = 0.1
"""Seconds between two looks at what has ended."""


class Processes:
    """A pool of child processes; with `gpus`, by the names that CUDA gives them, each task has some of its own."""

    def __init__(self, folder: Path, gpus: Sequence[str] = ()) -> None:
        self._folder, self._gpus = folder, tuple(gpus)

    def width(self, gpus: int = 0) -> int:
        """How many tasks of so many GPUs run at one time."""
        return max(1, len(self._gpus) // max(1, gpus))

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        """Run every task and tell of each as it ends; raises Interrupted once what runs has stopped."""
        for task in tasks:
            self._check(task)
        running = _Running(self._folder, self._gpus or ("",), bool(self._gpus), count_cores())
        with running, handling([signal.SIGINT, signal.SIGTERM, *heeded(signal.SIGHUP)], running.stop):
            waiting = list(tasks)
            while running.tasks or (waiting and not running.stops):
                while waiting and not running.stops and running.fits(waiting[0]):
                    running.start(waiting.pop(0))
                for end in running.reap(POLL):
                    ended(end)
        running.stops.check()

    def _check(self, task: Task) -> None:
        if self._gpus and task.gpus > len(self._gpus):
            here = f"{len(self._gpus)} that torch can use"
            raise MachineError(f"--on gpus: {task.name} needs {task.gpus} GPUs and this machine has {here}")


def gpu_slots() -> list[str]:
    """This machine's GPUs, by the names that CUDA_VISIBLE_DEVICES has; raises MachineError where there is none."""
    gpus = find_gpus()
    if not gpus.count:
        raise MachineError(f"--on gpus: {gpus.fault or 'this machine has no GPU'}; try --on local")
    if gpus.fault:
        print(f"--on gpus: {gpus.fault}; going on with {gpus.count}", file=sys.stderr, flush=True)
    return name_gpus(gpus.count, os.environ)


class _Running:
    """The tasks that run now, the GPUs that are free, and the stop signals so far."""

    def __init__(self, folder: Path, slots: Sequence[str], have_gpus: bool, cores: int) -> None:
        self._folder, self._free, self._have_gpus = folder, list(slots), have_gpus
        self._cores, self._count = cores, len(slots)
        self._exits = contextlib.ExitStack()
        self.tasks: dict[Child, tuple[Task, list[str]]] = {}
        self.stops = Stops()

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.tasks:  # an error in this process ended the loop
            child.stop(3)
            child.wait()
        self._exits.close()

    def stop(self, number: int) -> None:
        """Pass a stop signal on to every task."""
        count = self.stops.add(number)
        for child in list(self.tasks):
            child.stop(count)

    def fits(self, task: Task) -> bool:
        """Whether the GPUs that a task needs are free."""
        return len(self._free) >= self._needs(task)

    def start(self, task: Task) -> None:
        """Start a task on the first GPUs that are free."""
        mine = [self._free.pop(0) for _ in range(self._needs(task))]
        own = visibility(mine, os.environ) if self._have_gpus else {}
        cores = max(1, self._cores * len(mine) // self._count)
        words = [sys.executable, "-m", task.module, *task.words]
        folder = self._exits.enter_context(tempfile.TemporaryDirectory())
        child = Child(words, child_environment(cores, own, gpus=self._have_gpus), Path(folder))
        self.tasks[child] = task, mine
        with log_file(task, self._folder).open("ab") as log:
            child.start(log.fileno())
        if self.stops:  # a signal came while it started
            child.stop(1)

    def reap(self, seconds: float) -> list[Ended]:
        """Wait a moment; gives the tasks that have ended, but for those that a stop signal ended."""
        for child in list(self.tasks)[:1]:
            child.wait(seconds)
        ends = []
        for child in [child for child in self.tasks if child.wait(0)]:
            task, mine = self.tasks.pop(child)
            self._free += mine
            if not (self.stops and was_stopped(child.ended())):
                ends.append(ended_as(task, child.ended()))
        return ends

    def _needs(self, task: Task) -> int:
        return max(1, task.gpus) if self._have_gpus else 1
