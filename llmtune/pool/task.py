"""What a pool runs: modules of llmtune with their words, each in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """`python -m module words...`, by a name; running it again after a failure goes on where it ended."""

    name: str
    module: str
    words: tuple[str, ...]
    gpus: int = 0
    """GPUs that it needs where there are any."""
    log: Path | None = None
    """The file that what it prints is added to; without one, arms/NAME/log.txt in the pool's folder."""


@dataclass(frozen=True)
class Ended:
    """How a task ended: the exit code, 0 where it is done, and the line that says why where it failed."""

    task: Task
    code: int
    message: str = ""


class Pool(Protocol):
    """Where tasks run."""

    def width(self, gpus: int = 0) -> int:
        """How many tasks of so many GPUs run at one time."""

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        """Run every task and tell of each as it ends; a failed one does not end the others.

        Raises MachineError where the place is not there, Interrupted after Ctrl-C, once running tasks have stopped.
        """


def log_file(task: Task, folder: Path) -> Path:
    """The file of what a task prints, with its folder made."""
    file = task.log or folder / "arms" / task.name / "log.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
