"""Training in child processes: start them, pass stop signals on, and carry their errors back."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]

from llmtune.errors import Interrupted, LlmtuneError, TrainingError
from llmtune.launch.command import (
    _alone,
    choose_config,
    count_gpus,
    count_processes,
    read_config,
    training_command,
    training_environment,
)
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

EXIT_FILE = "LLMTUNE_EXIT_FILE"


@dataclass(frozen=True)
class Ended:
    """How a training ended: its exit code, 128 + signal where one ended it, and what it said of it, if anything."""

    code: int
    said: str = ""


def train_in_children(recipe: Recipe, run: Run, arguments: list[str]) -> None:
    """Train in processes of their own; what ends them early is raised, to be told after everything that they wrote."""
    ended = run_training(recipe, arguments)
    if not ended.code:
        return
    again = f"go on with: llmtune run {run.path}" if run.recipe_file.is_file() else "nothing was trained yet"
    if ended.code > 128:
        failed: LlmtuneError = Interrupted(ended.said or f"stopped; {again}")
    else:
        failed = TrainingError(ended.said or f"training ended with code {ended.code}; {again}")
    told = bool(ended.said) or ended.code > 128
    failed.exit_code = ended.code if told else TrainingError.exit_code
    raise failed


def run_training(recipe: Recipe, arguments: list[str]) -> Ended:
    """Train what `arguments` tell llmtune.train, in as many processes as recipe and machine say, and wait for it."""
    here = count_gpus()
    name = choose_config(recipe, here)
    env = training_environment(count_processes(recipe, name, here), len(os.sched_getaffinity(0)), here)
    alone = _alone(read_config(name))
    return execute(training_command(recipe, arguments, here), {**env, **alone}, launcher=not alone)


def execute(arguments: list[str], env: dict[str, str], launcher: bool) -> Ended:
    """Run a training, or its launcher, to its end.

    The first two stop signals ask the training to stop, and its end is waited for; the third kills it.
    """
    children: list[subprocess.Popen[bytes]] = []
    stops: list[int] = []

    def stop(number: int) -> None:
        stops.append(number)
        for child in children:
            # Python ends at once and in silence on SIGTERM, while Ctrl-C in the middle of an import is a traceback.
            _pass_on(child.pid, signal.SIGTERM if len(stops) < 3 else signal.SIGKILL, launcher)

    with tempfile.TemporaryDirectory() as folder, _handling(stop):
        left = Path(folder) / "code"
        # A group of its own: Ctrl-C in a terminal would end accelerate at once, with the training still saving.
        child = subprocess.Popen(
            arguments, env={**env, EXIT_FILE: str(left)}, stdin=subprocess.DEVNULL, process_group=0
        )
        children.append(child)
        if stops:
            child.kill()
        code, said = child.wait(), ""
        if left.is_file():
            told, _, said = left.read_text().partition("\n")
            code = int(told)
    if stops and code:
        return Ended(128 + stops[0], said)
    return Ended(code if code >= 0 else 128 - code, said)


def report_failure(error: LlmtuneError) -> int:
    """Say why a training ends, to the command that started it or, without one, on stderr; gives the exit code."""
    if EXIT_FILE in os.environ:
        _write_once(f"{error.exit_code}\n{error}")
    else:
        print(f"llmtune: {error}", file=sys.stderr)
    return error.exit_code


def _write_once(text: str) -> None:
    # "x": the first rank that fails is the cause of the others.
    with contextlib.suppress(FileExistsError), open(os.environ[EXIT_FILE], "x") as file:
        file.write(text)


def exit_process(code: int) -> NoReturn:
    """End a training process with a code that survives its launcher, which turns every failure into 1."""
    told = EXIT_FILE in os.environ
    if told and code:
        _write_once(f"{code}\n")
    # When a rank fails, torchrun kills the others, and after Ctrl-C one of them may still be writing the checkpoint.
    shown = 0 if told and code == Interrupted.exit_code else code
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # A process group that a failure leaves open may abort the interpreter's own end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(shown)
    sys.exit(shown)


@contextlib.contextmanager
def _handling(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` for stop signals, except for a SIGHUP that nohup has switched off."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    numbers = (signal.SIGINT, signal.SIGTERM, *hung_up)
    before = {number: signal.signal(number, lambda caught, _frame: stop(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(child: int, number: int, launcher: bool) -> None:
    """Signal the training: the child itself, or the children of a launcher, which is ended where it has none yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child)
        training = process.children() if launcher else [process]
        for one in training:
            one.send_signal(number)
        if not training:
            process.kill()
