"""The one boundary of every command: whatever ends it becomes one line on stderr and an exit code."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmtune.errors import FullMemoryError, Interrupted, LlmtuneError, ProofError, PublishError
from llmtune.launch.faults import told_in_one_line
from llmtune.launch.signals import handling, heeded
from llmtune.launch.streams import check_printed, show_any_text
from llmtune.launch.surroundings import forget_launchers

if TYPE_CHECKING:
    from llmtune.run import Run

_KINDS: dict[str, type[LlmtuneError]] = {
    "eval": ProofError,
    "merge": ProofError,
    "export": ProofError,
    "publish": PublishError,
}
"""The kind of a fault in each step after training."""
_NAMES = {
    "eval": "evaluation",
    "merge": "merging",
    "export": "exporting",
    "publish": "publishing",
    "report": "reporting",
}


class Stopped(KeyboardInterrupt):
    """A stop signal came, with that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; a mistake, a lack, a stop or a fault is one line on stderr."""
    show_any_text()
    forget_launchers(os.environ)
    try:
        with _stops_raised(), told_in_one_line(LlmtuneError):
            code = command() or 0
            if not code:
                check_printed()
            return code
    except LlmtuneError as error:
        print(f"llmtune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("llmtune: stopped", file=sys.stderr)
        return _code(stop)


@contextlib.contextmanager
def guarded_step(run: "Run", name: str, say_safe: bool = True) -> Iterator[None]:
    """Turn whatever ends a step after training into an error of that step.

    With `say_safe`, a line says first that the trained weights are safe, and how to continue; where memory is full, the
    error itself says it.
    """
    resume = f"continue with: llmtune run {shlex.quote(str(run.path))}"
    safe = f"training is safe in {run.delta}; {resume}"
    try:
        with told_in_one_line(_KINDS.get(name, LlmtuneError), run.path):
            yield
    except KeyboardInterrupt as stop:
        interrupted = Interrupted(f"{_NAMES.get(name, name)} was stopped; {safe}")
        interrupted.exit_code = _code(stop)
        raise interrupted from None
    except FullMemoryError as error:
        raise FullMemoryError(f"{error}; {safe}") from error
    except LlmtuneError:
        if say_safe:
            print(f"llmtune: {safe}", file=sys.stderr)
        raise


def _code(stop: KeyboardInterrupt) -> int:
    return 128 + (stop.number if isinstance(stop, Stopped) else int(signal.SIGINT))


@contextlib.contextmanager
def _stops_raised() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what runs as Ctrl-C does; one that is ignored, as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int) -> None:
        raise Stopped(number)

    with handling(heeded(signal.SIGTERM, signal.SIGHUP), stop):
        yield
