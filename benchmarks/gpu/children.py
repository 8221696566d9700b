"""Parts run in processes of their own: a crash ends one part, and memory is what one tool took."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import ROOT
from llmtune.files import write_json
from llmtune.machine.cores import count_cores

GRACE = 45.0
"""Seconds after its end in which a part must have come back; after that it hangs and is killed."""
POLL = 0.1


@dataclass(frozen=True)
class Task:
    """A function of a child process, and what it is given."""

    function: str
    """module:function in this package; it yields a dict per result."""
    device: str
    folder: Path
    until: float
    arguments: dict[str, Any]


class Child:
    """A process that does a task and gives its results one by one."""

    def __init__(self, task: Task, name: str, **environment: str) -> None:
        self.task, self._name = task, name
        self._results = task.folder / f"{name}.results.jsonl"
        self._log = task.folder / f"{name}.log"
        job = task.folder / f"{name}.job.json"
        write_json(job, {**vars(task), "folder": str(task.folder), "results": str(self._results)})
        self._results.touch()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.child", str(job)],
                cwd=ROOT, env=child_environment(task) | environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def results(self) -> Iterator[dict[str, Any]]:
        """What the process gives, as it comes; the last is an error where it crashed or did not end."""
        with self._results.open(encoding="utf-8") as lines:
            while True:
                ended = self._process.poll() is not None
                yield from (json.loads(line) for line in _whole_lines(lines))
                if ended:
                    break
                if time.monotonic() > self.task.until + GRACE:
                    self.kill()
                    yield {
                        "name": self._name,
                        "error": f"no end {GRACE:.0f} s after its time",
                        "traceback": self.tail(),
                    }
                    return
                time.sleep(POLL)
        if self._process.returncode:
            last = (self.tail(2000).strip().splitlines() or ["no message"])[-1][:300]
            words = f"ended with code {self._process.returncode}: {last}"
            yield {"name": self._name, "error": words, "traceback": self.tail()}

    def tail(self, size: int = 6000) -> str:
        """The end of what the process printed."""
        return self._log.read_text(errors="replace")[-size:]

    def kill(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _whole_lines(file: Any) -> Iterator[str]:
    """The lines that are complete; a half one is left for later."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line


def child_environment(task: Task) -> dict[str, str]:
    """The environment of a training of llmtune on one card, or on none, that reaches no network and shares no cache."""
    from llmtune.launch.command import gpu_environment, training_environment

    on_gpu = task.device != "cpu"
    own = {
        "ACCELERATE_USE_CPU": str(not on_gpu).lower(),
        "LLMTUNE_CACHE": str(task.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    environment = training_environment(1, count_cores(), int(on_gpu)) | own
    return environment | gpu_environment({"use_cpu": not on_gpu}, 1, environment)
