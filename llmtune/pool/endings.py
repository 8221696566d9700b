"""How a task's process ended, in one line."""

import os

from llmtune.errors import Interrupted
from llmtune.launch.ending import Exit
from llmtune.machine.exits import STOPS, ending_signal, exit_words
from llmtune.pool.task import Ended, Task


def ended_as(task: Task, result: Exit) -> Ended:
    """A task whose process ended so: its own line where it left one, else what its exit code means."""
    return Ended(task, result.code, result.message or (_words(result.code) if result.code else ""))


class Stops(list[int]):
    """The stop signals that came to a pool so far."""

    def add(self, number: int) -> int:
        """Take one more, and tell in a line what it does; gives how many there are."""
        self.append(number)
        words = ("stopping what runs, which is kept; again ends it at once", "ending at once")
        if len(self) <= len(words):
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"llmtune: {words[len(self) - 1]}\n".encode())
        return len(self)

    def check(self) -> None:
        """Raise Interrupted where there is one."""
        if self:
            stopped = Interrupted("stopped; the same command goes on from here")
            stopped.exit_code = 128 + self[0]
            raise stopped


def was_stopped(result: Exit) -> bool:
    """Whether a process ended as after Ctrl-C: its state is kept, and it is neither done nor failed."""
    return ending_signal(result.code) in STOPS


def _words(code: int) -> str:
    return exit_words(code) if ending_signal(code) else f"{exit_words(code)}; its log.txt says more"
