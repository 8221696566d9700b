"""Trainings that are killed: how one starts, when it is hit, what it leaves."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes of a training that a signal ended."""
STUCK_S, ORPHAN_S = 300, 20
STEPS = 30


@dataclass(frozen=True)
class Kill:
    """A signal, and when it comes: at a moment, after so many seconds of CPU and a short delay."""

    moment: str
    signal: signal.Signals
    seconds: float
    delay: float
    family: bool
    """Whether it goes to a command's children too, as when the machine goes down."""


@dataclass(frozen=True)
class Attempt:
    """How a training ended, and what it printed."""

    code: int
    output: str
    hit: bool
    orphans: int
    """Processes that outlived a killed command by more than `ORPHAN_S`."""

    @property
    def killed(self) -> bool:
        """Whether the signal ended it: one that comes while a process ends finds it done."""
        return self.hit and self.code in STOPPED


@dataclass(frozen=True)
class Result:
    """What a training leaves: the hash of each file of its delta, and the loss of each step in the log's order."""

    delta: dict[str, str]
    losses: list[tuple[int, float]]


def differences(wanted: Result, got: Result) -> list[str]:
    """Say in which files and steps two trainings differ."""
    files = [name for name in {**wanted.delta, **got.delta} if wanted.delta.get(name) != got.delta.get(name)]
    if [step for step, _ in wanted.losses] != [step for step, _ in got.losses]:
        return [*files, f"the log has the steps {[step for step, _ in got.losses]}"]
    losses = [f"loss of step {a[0]}" for a, b in zip(wanted.losses, got.losses, strict=True) if a != b]
    return files + losses


@dataclass
class Bench:
    """A tiny base, rows and a recipe in a folder; the run that nothing stops is the reference."""

    folder: Path
    name: str
    method: dict[str, Any]
    frozen_blocks: str
    seconds: float = field(init=False, default=1e9)
    """CPU seconds of the run that nothing stops."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        os.environ["LLMTUNE_CACHE"] = str(self.cache)
        _import_everything()
        code, output = _wait(_fork(self._write_inputs, self.folder / "inputs.txt"), self.folder / "inputs.txt")
        assert code == 0, output
        attempt, self.seconds = self._run("reference", None, self._fork_training("reference", True))
        assert attempt.code == 0, attempt.output
        self.reference = self.result("reference")
        assert len(self.reference.losses) == STEPS

    @property
    def cache(self) -> Path:
        """Where outputs of frozen blocks are kept."""
        return self.folder / "cache"

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.folder / "recipe.yaml"

    @property
    def moments(self) -> list[str]:
        """The names of moments at which this recipe's run may be hit, more often the likelier ones."""
        cached = ["cache"] if self.frozen_blocks == "cache" else []
        return ["any"] * 3 + ["checkpoint"] * 3 + ["sealed", "begun", "file", "delta", *cached]

    def attempt(self, name: str, kill: Kill | None, by_command: bool, rng: random.Random) -> Attempt:
        """Start or go on with a run, in a fork or by the command, by its recipe or its folder, and kill it."""
        by_recipe = rng.random() < 0.3 or not (self.folder / name / "recipe.yaml").is_file()
        start = self._run_command if by_command else self._fork_training
        return self._run(name, kill, start(name, by_recipe))[0]

    def checkpoints(self, name: str) -> list[int]:
        """The steps of a run's complete checkpoints."""
        from llmtune.training.checkpoint import checkpoint_step, complete_checkpoints

        return [checkpoint_step(folder) for folder in complete_checkpoints(self.folder / name / "checkpoints")]

    def result(self, name: str) -> Result:
        """What a finished run left."""
        run = self.folder / name
        files = sorted(file for file in (run / "delta").rglob("*") if file.is_file())
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return Result(digests, [(entry["step"], entry["loss"]) for entry in log if "loss" in entry])

    def leftovers(self, name: str) -> list[str]:
        """What a finished run should have removed: half-written files and folders, too many checkpoints."""
        run = self.folder / name
        partial = [*run.rglob(".*partial*"), *self.cache.rglob(".*partial*")]
        steps = self.checkpoints(name)
        return [str(path.relative_to(self.folder)) for path in partial] + [f"step {step}" for step in steps[:-2]]

    def _write_inputs(self) -> int:
        from tests.support import tiny

        base = tiny.save_base(self.folder / "base", blocks=4, tied=False)
        rows = tiny.write_rows(self.folder / "rows.jsonl", tiny.sums(96))
        train = {"epochs": 99, "max_steps": STEPS, "batch_size": 8, "save_every": 0.05, "keep": 2}
        memory = {"frozen_blocks": self.frozen_blocks}
        tiny.write_recipe(self.recipe, base, rows, self.method, memory=memory, train=train, merge={"enabled": False})
        return 0

    def _words(self, name: str, by_recipe: bool) -> list[str]:
        run = str(self.folder / name)
        return [str(self.recipe), f"--out={run}"] if by_recipe else [run]

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def _fork_training(self, name: str, by_recipe: bool) -> int:
        """Start what `llmtune run` starts to train."""
        from llmtune.training.process import main

        return _fork(lambda: main(self._words(name, by_recipe)), self._output(name))

    def _run_command(self, name: str, by_recipe: bool) -> int:
        """Start `llmtune run`."""
        words = [sys.executable, "-m", "llmtune", "run", *self._words(name, by_recipe)]
        with self._output(name).open("w") as output:
            return subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True).pid

    def _run(self, name: str, kill: Kill | None, pid: int) -> tuple[Attempt, float]:
        """Watch a training until it ends or is hit; gives its CPU seconds too."""
        family, begin, hit = Family(pid), time.monotonic(), False
        reached = self._watcher(name, kill.moment) if kill else None
        while (code := _exit_code(pid)) is None:
            family.read()
            if kill and reached and not hit and family.seconds >= kill.seconds and reached():
                time.sleep(kill.delay)
                hit = family.signal(kill.signal, kill.family)
            if time.monotonic() - begin > STUCK_S:
                family.signal(signal.SIGKILL, True)
            time.sleep(0.0005)
        orphans = family.wait_for_family()
        return Attempt(code, self._output(name).read_text(errors="replace"), hit, orphans), family.seconds

    def _watcher(self, name: str, moment: str) -> Callable[[], object]:
        """A function that says whether a moment has come: a file half written, a checkpoint just complete."""
        run = self.folder / name
        checkpoints = run / "checkpoints"
        before = set(checkpoints.glob("step-*"))
        return {
            "any": lambda: True,
            "begun": lambda: (run / "recipe.yaml").is_file(),
            "checkpoint": lambda: any(checkpoints.glob(".step-*partial*")),
            "sealed": lambda: set(checkpoints.glob("step-*")) - before,
            "file": lambda: any(run.glob(".*.*.partial-*")),
            "delta": lambda: any(run.glob(".delta*partial*")) or (run / "delta").is_dir(),
            "cache": lambda: any(self.cache.rglob(".*partial*")),
        }[moment]


def _import_everything() -> None:
    """Import what training imports; nothing may run here, as forks need a process without threads."""
    import torch

    torch.set_num_threads(1)
    from llmtune.launch.quiet import quiet_libraries
    from llmtune.training import process
    from tests.support import tiny

    quiet_libraries()
    assert process
    assert tiny


def _fork(work: Callable[[], int], output: Path) -> int:
    """Run a function in a fork with a process group of its own; its result is the exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, output: Path) -> tuple[int, str]:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.read_text()


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


class Family:
    """A process and its children: CPU seconds are the clock of kills, as other work stretches wall time."""

    def __init__(self, pid: int) -> None:
        self.seconds, self._process, self._family, self._reads = 0.0, psutil.Process(pid), [psutil.Process(pid)], 0

    def signal(self, number: signal.Signals, children: bool) -> bool:
        """Send a signal to the process, and to its children; False where none of them was there."""
        family = self._alive()
        return any([_send(process, number) for process in (reversed(family) if children else family[:1])])

    def _alive(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            self._family = [self._process, *self._process.children(recursive=True)]
        return self._family

    def wait_for_family(self) -> int:
        """Wait for the children of a process that ended; kills and counts those that stay."""
        end = time.monotonic() + ORPHAN_S
        while (orphans := [process for process in self._family[1:] if _lives(process)]) and time.monotonic() < end:
            time.sleep(0.01)
        for process in orphans:
            _send(process, signal.SIGKILL)
        return len(orphans)

    def read(self) -> None:
        """Update `seconds`; children are looked for every hundredth time, as that takes long."""
        self._reads += 1
        family = self._alive() if self._reads % 100 == 0 else self._family
        times = []
        for process in family:
            with contextlib.suppress(psutil.Error):  # it has just ended
                times.append(process.cpu_times())
        self.seconds = max(self.seconds, sum(one.user + one.system for one in times))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True
