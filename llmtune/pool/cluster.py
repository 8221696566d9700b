"""Tasks on the machines of a Ray cluster; what a lost worker did is run again."""

import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmtune.errors import MachineError, first_line
from llmtune.launch.ending import Exit
from llmtune.launch.signals import handling, heeded
from llmtune.pool.endings import Stops, ended_as, was_stopped
from llmtune.pool.remote import run_process
from llmtune.pool.task import Ended, Task, log_file
from llmtune.working import working

if TYPE_CHECKING:
    from ray import ObjectRef

TRIES = 3
"""How often a task runs again whose worker was lost."""
PATIENCE = 5.0
"""Seconds that a cluster's first machine may take to answer."""
POLL = 0.5
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray would print paragraphs about a lost worker to stdout
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
"""Ray's environment, which it reads when it is imported."""
_START = "start one with: ray start --head, and on each other machine: ray start --address=HOST:6379"


def connect(folder: Path) -> "Cluster":
    """The Ray cluster at RAY_ADDRESS, else the one that this machine belongs to; raises MachineError without one."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MachineError('--on ray: Ray is not installed; pip install "llmtune[ray]"') from error
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _refuse_silent(address)
    if not ray.is_initialized():
        try:
            with working("connecting to the Ray cluster"):
                ray.init(address, logging_level="ERROR", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise MachineError(_not_there(address, first_line(error))) from error
    return Cluster(folder, ray)


def _refuse_silent(address: str) -> None:
    """Raise MachineError where nothing listens: Ray itself would try for two minutes, and end this process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, ValueError) as error:
        raise MachineError(_not_there(address, first_line(error))) from error


def _not_there(address: str, reason: str) -> str:
    where = "" if address == "auto" else f" at RAY_ADDRESS={address[:100]}"
    return f"--on ray: no Ray cluster answers{where} ({reason[:200]}); {_START}"


class Cluster:
    """A pool on a Ray cluster that this process is connected to."""

    def __init__(self, folder: Path, ray: ModuleType) -> None:
        self._folder, self._ray = folder.absolute(), ray
        self._machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and _count(node, "CPU")]

    def width(self, gpus: int = 0) -> int:
        """How many tasks of so many GPUs run at one time."""
        needed, cores = self.share(gpus)
        fits = (min(int(each["CPU"]) // cores, _fit(each, needed)) for each in self._machines)
        return max(1, sum(fits))

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        """Run every task and tell of each as it ends; raises Interrupted once what runs has stopped."""
        for task in tasks:
            self._check(task)
        with self._mark() as mark:
            running = _Running(self._ray, lambda task: self._send(task, mark))
            with running, handling([signal.SIGINT, signal.SIGTERM, *heeded(signal.SIGHUP)], running.stop):
                for task in tasks:
                    running.start(task)
                while running.tasks:
                    for end in running.reap():
                        ended(end)
        running.stops.check()

    def _check(self, task: Task) -> None:
        most = max((int(each.get("GPU", 0)) for each in self._machines), default=0)
        if not self._machines:
            raise MachineError("--on ray: no machine of the Ray cluster offers a CPU; ray status lists what it has")
        if most and task.gpus > most:
            raise MachineError(
                f"--on ray: {task.name} needs {task.gpus} GPUs and no machine of the cluster has over {most}"
            )

    def share(self, gpus: int) -> tuple[int, int]:
        """The GPUs and CPUs of a task: all get the same, on CPUs a whole machine of the smallest kind."""
        having = [each for each in self._machines if int(each.get("GPU", 0)) >= max(1, gpus)]
        if not having:
            return 0, max(1, min((int(each["CPU"]) for each in self._machines), default=1))
        needed = max(1, gpus)
        return needed, max(1, min(int(each["CPU"]) * needed // int(each["GPU"]) for each in having))

    @contextlib.contextmanager
    def _mark(self) -> Iterator[Path]:
        """A file by which a machine sees that its folder is the one here."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mark = self._folder / f".shared-{secrets.token_hex(8)}"
        mark.touch()
        try:
            yield mark
        finally:
            mark.unlink(missing_ok=True)

    def _send(self, task: Task, mark: Path) -> "ObjectRef":
        gpus, cores = self.share(task.gpus)
        words = ["-m", task.module, *task.words]
        # Ray's own retries would be without end where memory was full.
        options = {"num_cpus": cores, "num_gpus": gpus, "max_retries": 0, "name": task.name}
        remote = self._ray.remote(run_process).options(**options, scheduling_strategy="SPREAD")
        return remote.remote(words, str(log_file(task, self._folder)), os.getcwd(), str(mark), cores, gpus)


class _Running:
    """The tasks that a cluster has, how often each was sent, and the stop signals so far."""

    def __init__(self, ray: ModuleType, send: Callable[[Task], "ObjectRef"]) -> None:
        self._ray, self._send = ray, send
        self.tasks: dict[ObjectRef, tuple[Task, int]] = {}
        self.stops = Stops()

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel(force=True)  # none, but after an error in this process

    def start(self, task: Task, again: int = 0) -> None:
        """Send a task to the cluster, unless a stop signal came."""
        if not self.stops:
            self.tasks[self._send(task)] = task, again

    def stop(self, number: int) -> None:
        """Ask every task to save and stop; at the second signal, end them at once."""
        self._cancel(force=self.stops.add(number) > 1)

    def _cancel(self, force: bool) -> None:
        for task in list(self.tasks):
            self._ray.cancel(task, force=force)

    def reap(self) -> list[Ended]:
        """Wait a moment; gives the tasks that have ended, but for those that a stop signal ended."""
        ends = []
        for sent in self._ray.wait(list(self.tasks), num_returns=1, timeout=POLL)[0]:
            task, again = self.tasks.pop(sent)
            result = self._result(sent, task, again)
            if result and not (self.stops and was_stopped(result)):
                ends.append(ended_as(task, result))
        return ends

    def _result(self, sent: "ObjectRef", task: Task, again: int) -> Exit | None:
        """How a task ended; None for one that was cancelled, or that runs again since its worker was lost."""
        errors = self._ray.exceptions
        try:
            return Exit(*self._ray.get(sent))
        except errors.TaskCancelledError:
            return None
        except errors.RayTaskError as error:
            return Exit(3, f"a worker of the cluster cannot run it: {first_line(error.cause or error)}")
        except errors.RayError as error:
            if self.stops:
                return None
            lost = f"its worker was lost: {type(error).__name__}"
            if again == TRIES:
                return Exit(3, f"{lost}, for the {again + 1}th time")
            print(f"llmtune: note: {task.name}: {lost}; it runs again", file=sys.stderr, flush=True)
            self.start(task, again + 1)
            return None


def _count(node: dict[str, Any], kind: str) -> int:
    return int(node["Resources"].get(kind, 0))


def _fit(resources: dict[str, float], gpus: int) -> int:
    return int(resources.get("GPU", 0)) // gpus if gpus else sys.maxsize
