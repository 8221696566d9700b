"""What a pool runs: modules of llmtune with their words, each in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """`python -m module words...`, by a name; running it again after a failure goes on where it ended."""

    name: str
    module: str
    words: tuple[str, ...]
    gpus: int = 0
    """GPUs that it needs where there are any."""


@dataclass(frozen=True)
class Ended:
    """How a task ended: the exit code, 0 where it is done, and the line that says why where it failed."""

    task: Task
    code: int
    message: str = ""


class Pool(Protocol):
    """Where tasks run."""

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        """Run every task and tell of each as it ends; a failed one does not end the others.

        Raises MachineError where the place is not there, Interrupted after Ctrl-C, once running tasks have stopped.
        """
