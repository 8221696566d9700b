"""Processes that encode batches of rows, one on each core; they end at once with the process that started them.

They are started as a command of their own: a fork beside torch's threads may hang, and a spawned process of
multiprocessing would run a user's script again.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, cast

import llmtune
from llmtune import errors
from llmtune.errors import FieldError, FullMemoryError, LlmtuneError, MachineError
from llmtune.machine.cores import count_cores
from llmtune.machine.exits import ending_signal, exit_words
from llmtune.machine.memory import free_memory

Batch = tuple[int, int, int]
"""The number of a batch, and the places of its first row and of the row after its last."""
Answer = dict[str, Any]
MEMORY = 1 << 30
"""Bytes of free memory for each process."""


class NoStartError(Exception):
    """A process ended before it encoded anything."""


def processes_for(rows: int, least: int) -> int:
    """How many processes encode so many rows: one a core, and for each `least` rows and memory that is free."""
    return max(1, min(count_cores(), rows // least, free_memory() // MEMORY))


def encode_in_processes(
    batches: Sequence[Batch], folder: Path, count: int
) -> Generator[tuple[Batch, Path], None, None]:
    """Give each batch with the file of its part, as they are finished; `folder` is what the processes read.

    Raises the error of the first row that is wrong, whatever process finds one first, and NoStartError.
    """
    answers: SimpleQueue[tuple[Batch, Answer]] = SimpleQueue()
    tasks = _Tasks(batches)
    commands = [_start(folder) for _ in range(count)]
    try:
        for command in commands:
            threading.Thread(target=_feed, args=(command, tasks, answers), daemon=True).start()
        failed: tuple[Batch, Answer] | None = None
        left = len(batches)
        while left:
            batch, answer = answers.get()
            left -= 1
            if "part" in answer:
                yield batch, Path(answer["part"])
                continue
            left -= tasks.stop()
            failed = min(failed or (batch, answer), (batch, answer), key=lambda pair: pair[0])
        if failed:
            raise _error(failed[1], folder)
    finally:
        for command in commands:
            command.kill()
            command.wait()


class _Tasks:
    """Batches that no process has begun, in order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches, self._lock = list(reversed(batches)), threading.Lock()

    def take(self) -> Batch | None:
        """The next batch, None where there is none."""
        with self._lock:
            return self._batches.pop() if self._batches else None

    def stop(self) -> int:
        """Let no other batch begin; returns how many never will."""
        with self._lock:
            count = len(self._batches)
            self._batches.clear()
            return count


def _start(folder: Path) -> "subprocess.Popen[str]":
    """Start a process outside this one's group, so that Ctrl-C reaches it as the end of its input alone."""
    package = str(Path(llmtune.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = os.environ | one_thread | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "errors.txt").open("a") as stderr:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "llmtune.data.store.process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            process_group=0,
        )


def _feed(command: "subprocess.Popen[str]", tasks: _Tasks, answers: "SimpleQueue[tuple[Batch, Answer]]") -> None:
    """Give a process one batch after the other."""
    began = False
    while (batch := tasks.take()) is not None:
        try:
            print(json.dumps(batch), file=cast(IO[str], command.stdin), flush=True)
            line = cast(IO[str], command.stdout).readline()
        except OSError:  # it is gone
            line = ""
        answer = json.loads(line) if line.endswith("\n") else {"ended": command.wait(), "began": began}
        answers.put((batch, answer))
        if "ended" in answer:
            return
        began = True


def _error(answer: Answer, folder: Path) -> Exception:
    """The error that a process answered with, as it was raised there."""
    if "ended" in answer:
        words = f"a process that encodes rows {exit_words(answer['ended'])}"
        if ending_signal(answer["ended"]) == signal.SIGKILL:
            return FullMemoryError(f"{words}; free some memory")
        if not answer["began"]:
            return NoStartError((folder / "errors.txt").read_text(errors="replace")[-500:])
        return MachineError(words)
    if "errno" in answer:
        return OSError(answer["errno"], answer["message"], answer["file"])
    if "fault" in answer:
        return RuntimeError(answer["fault"])
    kind = getattr(errors, answer["kind"], LlmtuneError)
    return (
        FieldError(answer["key"], answer["message"], kind)
        if "key" in answer
        else cast(Exception, kind(answer["message"]))
    )
