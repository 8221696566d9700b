"""Runs training in child processes, forwards stop signals to them, and raises their errors here."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]

from llmtune.errors import Interrupted, LlmtuneError, TrainingError
from llmtune.launch.command import TRAIN_MODULE, training_process
from llmtune.launch.ending import Exit, training_error
from llmtune.launch.faults import told_in_one_line
from llmtune.launch.parent import PARENT, follow_parent
from llmtune.launch.quiet import is_verbose, quiet_libraries
from llmtune.launch.signals import handling, heeded
from llmtune.launch.streams import outlive_readers, show_any_text
from llmtune.machine.cores import count_cores
from llmtune.machine.gpus import find_gpus, show_gpus
from llmtune.recipe.sections import Launch, Recipe
from llmtune.run import Run, locates_mistakes
from llmtune.working import own_process, use_stdout

EXIT_FILE = "LLMTUNE_EXIT_FILE"
AT_ONCE = "ending at once"


@locates_mistakes
def train_in_children(recipe: Recipe, run: Run, arguments: list[str]) -> None:
    """Run training in child processes; raise its error after their output has been printed."""
    # Now, since importing torch takes seconds.
    print(f"starting to train: {shlex.quote(arguments[0])}", flush=True)
    result = run_training(recipe.launch, arguments)
    if result.code:
        raise training_error(result, run, recipe)


def run_training(launch: Launch, arguments: list[str]) -> Exit:
    """Run llmtune.train with these arguments in as many processes as launch section and machine give, and wait."""
    return run_module(TRAIN_MODULE, launch, arguments)


def run_module(module: str, launch: Launch, arguments: list[str]) -> Exit:
    """Run a module of llmtune with these arguments as a training is run."""
    gpus = find_gpus()
    if launch.accelerate == "auto" and gpus.fault:
        print(f"launch: {gpus.fault}; going on with {_devices(gpus.count)}", flush=True)
    training = training_process(launch, arguments, gpus, count_cores(), module)
    return execute(training.arguments, training.environment, training.launcher)


def _devices(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "the CPU"


def execute(arguments: list[str], env: dict[str, str], launcher: bool) -> Exit:
    """Run a training, or its launcher, and wait for its end.

    The first two stop signals ask the training to save and stop; the third kills it.
    """
    stops: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        child = Child(arguments, env, Path(folder), launcher)

        def stop(number: int) -> None:
            stops.append(number)
            child.answer(len(stops))
            child.stop(len(stops))

        with handling([signal.SIGINT, signal.SIGTERM, *heeded(signal.SIGHUP)], stop):
            child.start()
            if stops:
                child.stop(3)
            child.wait()
        ended = child.ended()
    return Exit(128 + stops[0], ended.message) if stops else ended


class Child:
    """A child process of llmtune, and the file in `folder` where it leaves how it ended."""

    def __init__(self, arguments: list[str], env: dict[str, str], folder: Path, launcher: bool = False) -> None:
        self._arguments, self._launcher = arguments, launcher
        self._exit_file = folder / "code"
        self._env = {**env, EXIT_FILE: str(self._exit_file), PARENT: str(os.getpid())}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, output: int | None = None, kept_open: tuple[int, ...] = ()) -> None:
        """Start it; what it prints goes to a file descriptor, or where this process prints."""
        # In the terminal's process group, Ctrl-C would end accelerate at once while the training still saves.
        self._process = subprocess.Popen(
            self._arguments,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=kept_open,
            process_group=0,
        )

    def stop(self, count: int) -> None:
        """Ask it to save and stop; from the third stop signal on, kill it."""
        if self._process is not None:
            # SIGTERM ends Python at once and silently, while SIGINT in the middle of an import prints a traceback.
            _forward_signal(self._process.pid, signal.SIGTERM if count < 3 else signal.SIGKILL, self._launcher)

    def answer(self, count: int) -> None:
        """Answer the first or second stop signal in one line, where it left words; without, it ends at once."""
        _answer(self._exit_file, count)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, so many seconds at most; gives whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process is None or self._process.wait(seconds) is not None
        return False

    def ended(self) -> Exit:
        """How it ended: the code and the line that it left, else the code of the process."""
        code, message = self._process.returncode if self._process else 0, ""
        if self._exit_file.is_file():
            first_line, _, message = self._exit_file.read_text(encoding="utf-8").partition("\n")
            code = int(first_line) if first_line.isdigit() else code
        return Exit(code if code >= 0 else 128 - code, message)


def answer_stops(words: str) -> None:
    """Leave the words by which the command that started the training answers Ctrl-C at once."""
    if EXIT_FILE in os.environ:
        Path(_answer_file(os.environ[EXIT_FILE])).write_text(words)


def _answer_file(exit_file: str) -> str:
    return f"{exit_file}.answer"


def _answer(exit_file: Path, count: int) -> None:
    """Answer the first or second stop signal in one line, where the training left words; without, it ends at once."""
    with contextlib.suppress(OSError):
        words = Path(_answer_file(str(exit_file))).read_text() if count == 1 else AT_ONCE * (count == 2)
        if words:
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"llmtune: {words}\n".encode())


def report_failure(error: LlmtuneError) -> int:
    """Report an error to the command that started the training, or without one on stderr; return the exit code."""
    if EXIT_FILE not in os.environ or not _write_once(f"{error.exit_code}\n{error}"):
        print(f"llmtune: {error}", file=sys.stderr)
    return error.exit_code


def reporting_failures(command: Callable[[], int]) -> int:
    """Run what a training process does; whatever ends it is reported in one line. Returns the exit code."""
    show_any_text()
    try:
        with told_in_one_line(TrainingError):
            return command()
    except LlmtuneError as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code


def serve_command(command: Callable[[list[str]], int]) -> NoReturn:
    """Be a process that another one of llmtune started: run what it does with the words of the command line, and end.

    `command` imports torch only once it is called: before, the GPUs of this process are chosen.
    """
    follow_parent()
    os.environ.update(show_gpus(os.environ))
    own_process()
    outlive_readers()
    use_stdout()
    if not is_verbose():
        quiet_libraries()  # bitsandbytes warns when it is imported
    exit_process(reporting_failures(lambda: command(sys.argv[1:])))


def leave_code(code: int) -> None:
    """Leave the code of a signal that ended a process of a launcher; one that kills is why the others failed."""
    killed = code - 128 in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
    with contextlib.suppress(OSError):
        if killed and EXIT_FILE in os.environ:
            Path(os.environ[EXIT_FILE]).unlink(missing_ok=True)
    if EXIT_FILE in os.environ:
        _write_once(f"{code}\n")


def _write_once(text: str) -> bool:
    """Write how a training ended, unless another process did; False where the disk does not take it."""
    try:
        # "x": the first rank that fails causes the others to fail.
        with contextlib.suppress(FileExistsError), open(os.environ[EXIT_FILE], "x", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return False
    return True


def exit_process(code: int) -> NoReturn:
    """End a training process with a code that survives its launcher, which turns every failure into 1."""
    launched = EXIT_FILE in os.environ
    if launched and code:
        _write_once(f"{code}\n")
    # When a rank fails, torchrun kills the others, and after Ctrl-C one of them may still be writing the checkpoint.
    status = 0 if launched and code == Interrupted.exit_code else code
    if code and (os.environ.get("WORLD_SIZE", "1") != "1" or PARENT in os.environ):
        # A process group left open by a failure may abort the interpreter while it shuts down, and torch takes seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _forward_signal(child: int, number: int, launcher: bool) -> None:
    """Signal the training: the child, or the children of a launcher; a launcher without children is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child)
        training = process.children() if launcher else [process]
        for one in training:
            one.send_signal(number)
        if not training:
            process.kill()
