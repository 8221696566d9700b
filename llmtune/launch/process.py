"""Runs training in child processes, forwards stop signals to them, and raises their errors here."""

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
from llmtune.launch.command import count_gpus, training_process
from llmtune.recipe.sections import Launch, Recipe
from llmtune.run import Run, locates_mistakes

EXIT_FILE = "LLMTUNE_EXIT_FILE"


@dataclass(frozen=True)
class Exit:
    """How a training ended: its exit code, 128 + the number of a signal that ended it, and its error message."""

    code: int
    message: str = ""


@locates_mistakes
def train_in_children(recipe: Recipe, run: Run, arguments: list[str]) -> None:
    """Run training in child processes; raise its error after their output has been printed."""
    result = run_training(recipe.launch, arguments)
    if result.code:
        raise training_error(result, run)


def training_error(result: Exit, run: Run) -> LlmtuneError:
    """Make the error of a training that ended early: its own message and code, or a line that says how to continue."""
    resume = f"continue with: llmtune run {run.path}" if run.recipe_file.is_file() else "nothing was trained yet"
    if result.code > 128:
        error: LlmtuneError = Interrupted(result.message or f"stopped; {resume}")
    else:
        error = TrainingError(result.message or f"training ended with code {result.code}; {resume}")
    explained = bool(result.message) or result.code > 128
    error.exit_code = result.code if explained else TrainingError.exit_code
    return error


def run_training(launch: Launch, arguments: list[str]) -> Exit:
    """Run llmtune.train with these arguments in as many processes as launch section and machine give, and wait."""
    training = training_process(launch, arguments, count_gpus(), len(os.sched_getaffinity(0)))
    return execute(training.arguments, training.environment, training.launcher)


def execute(arguments: list[str], env: dict[str, str], launcher: bool) -> Exit:
    """Run a training, or its launcher, and wait for its end.

    The first two stop signals ask the training to save and stop; the third kills it.
    """
    children: list[subprocess.Popen[bytes]] = []
    stops: list[int] = []

    def stop(number: int) -> None:
        stops.append(number)
        for child in children:
            # SIGTERM ends Python at once and silently, while SIGINT in the middle of an import prints a traceback.
            _forward_signal(child.pid, signal.SIGTERM if len(stops) < 3 else signal.SIGKILL, launcher)

    with tempfile.TemporaryDirectory() as folder, _on_stop_signals(stop):
        exit_file = Path(folder) / "code"
        # In the terminal's process group, Ctrl-C would end accelerate at once while the training still saves.
        child = subprocess.Popen(
            arguments, env={**env, EXIT_FILE: str(exit_file)}, stdin=subprocess.DEVNULL, process_group=0
        )
        children.append(child)
        if stops:
            child.kill()
        code, message = child.wait(), ""
        if exit_file.is_file():
            first_line, _, message = exit_file.read_text().partition("\n")
            code = int(first_line)
    if stops and code:
        return Exit(128 + stops[0], message)
    return Exit(code if code >= 0 else 128 - code, message)


def report_failure(error: LlmtuneError) -> int:
    """Report an error to the command that started the training, or without one on stderr; return the exit code."""
    if EXIT_FILE in os.environ:
        _write_once(f"{error.exit_code}\n{error}")
    else:
        print(f"llmtune: {error}", file=sys.stderr)
    return error.exit_code


def _write_once(text: str) -> None:
    # "x": the first rank that fails causes the others to fail.
    with contextlib.suppress(FileExistsError), open(os.environ[EXIT_FILE], "x") as file:
        file.write(text)


def exit_process(code: int) -> NoReturn:
    """End a training process with a code that survives its launcher, which turns every failure into 1."""
    launched = EXIT_FILE in os.environ
    if launched and code:
        _write_once(f"{code}\n")
    # When a rank fails, torchrun kills the others, and after Ctrl-C one of them may still be writing the checkpoint.
    status = 0 if launched and code == Interrupted.exit_code else code
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # A process group left open by a failure may abort the interpreter while it shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _on_stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the number of each stop signal, except for a SIGHUP that nohup ignores."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    numbers = (signal.SIGINT, signal.SIGTERM, *hung_up)
    before = {number: signal.signal(number, lambda caught, _frame: stop(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward_signal(child: int, number: int, launcher: bool) -> None:
    """Signal the training: the child, or the children of a launcher; a launcher without children is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child)
        training = process.children() if launcher else [process]
        for one in training:
            one.send_signal(number)
        if not training:
            process.kill()
