"""Where other libraries' errors end: each becomes one line that names what was at work, with the right exit code."""

import contextlib
import traceback
from collections.abc import Iterator

from llmtune.errors import (
    LONGEST_LINE,
    FullMemoryError,
    LlmtuneError,
    MachineError,
    ProofError,
    causes,
    first_line,
    lacks_memory,
)
from llmtune.machine.disk import disk_fault
from llmtune.machine.shortage import shortage

LESS_MEMORY = "lower eval.shots, ask fewer rows with eval.limit, free some memory, or go without with eval.suite: none"


@contextlib.contextmanager
def failures_named(what: str, remedy: str) -> Iterator[None]:
    """Raise whatever ends the block as one line about `what`: a ProofError, or a MachineError for what is lacking.

    `remedy` ends the line of a ProofError. llmtune's own errors pass.
    """
    try:
        with lacks_named(what):
            yield
    except LlmtuneError:
        raise
    except Exception as error:
        raise ProofError(f"{what}: {kind_and_line(error)} (in {_place(error)}); {remedy}") from error


@contextlib.contextmanager
def lacks_named(what: str, less_memory: str = LESS_MEMORY) -> Iterator[None]:
    """Raise a MachineError of one line about `what` where the machine lacks something; other errors pass.

    `less_memory` says what to do where memory is full.
    """
    try:
        yield
    except LlmtuneError:
        raise
    except Exception as error:
        lack = machine_lacks(error, less_memory)
        if lack is None:
            raise
        kind = FullMemoryError if any(map(lacks_memory, causes(error))) else MachineError
        raise kind(f"{what}: {lack}") from error


def machine_lacks(error: Exception, less_memory: str = LESS_MEMORY) -> str | None:
    """Say what this machine lacks, if an error means that (memory, disk, network or package), and what to do."""
    if memory := next(filter(lacks_memory, causes(error)), None):
        return f"{shortage(memory)}; {less_memory}"
    if isinstance(error, ConnectionError):
        return f"the network cannot be reached: {kind_and_line(error)}"
    if disk := disk_fault(error):
        return f"{disk}; mend that and run it again"
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the Python package {error.name}; install it and run this again"
    return None


def kind_and_line(error: BaseException) -> str:
    """Return an error's kind and the first line of its text, if it has one."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line[:LONGEST_LINE]}"


def _place(error: BaseException) -> str:
    """Name the function in which an error was raised, its file and line, without folders."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return f"{last.name}, {last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
