"""How a task's process ended, in one line."""

import os
import signal

from llmtune.errors import Interrupted
from llmtune.launch.ending import STOPS, Exit
from llmtune.machine.memory import machine_memory
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
    return result.code - 128 in STOPS


def _words(code: int) -> str:
    number = code - 128
    if number in STOPS:
        return "was stopped"
    if number == signal.SIGKILL:
        return f"was killed (signal 9), probably by the system for lack of memory: {machine_memory()}"
    if number in set(signal.Signals):
        return f"crashed (signal {number}, {signal.Signals(number).name})"
    return f"ended with code {code}; its log.txt says more"
