"""Whatever ends a step becomes one line: what the machine lacks, or a fault of llmtune with its full text in a file."""

import contextlib
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from llmtune import __version__
from llmtune.errors import LONGEST_LINE, FullMemoryError, LlmtuneError, MachineError, causes, first_line, lacks_memory
from llmtune.files import ERROR_FILE, write_text
from llmtune.machine.disk import disk_fault
from llmtune.machine.shortage import shortage

VERBOSE = "LLMTUNE_VERBOSE"
"""Set to 1, it has the full text of what ends a step printed too."""

Words = Callable[[], str]
"""Gives a part of the line when it is needed."""


@contextlib.contextmanager
def told_in_one_line(
    kind: type[LlmtuneError], folder: Path | None = None, safe: Words = str, less_memory: Words = str
) -> Iterator[None]:
    """Turn any exception of the block that is no LlmtuneError into one, as `in_one_line` does."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LlmtuneError):
            raise
        raise in_one_line(error, kind, folder, safe, less_memory) from error


def in_one_line(
    error: Exception, kind: type[LlmtuneError], folder: Path | None = None, safe: Words = str, less_memory: Words = str
) -> LlmtuneError:
    """The error to report for an exception: a MachineError for full memory or disk, else a fault of this `kind`.

    `folder` is what the step writes to: a fault's full text goes there, or to a temporary file. `safe` says what is
    safe and how to go on, `less_memory` which settings lower memory.
    """
    if isinstance(error, LlmtuneError):
        return error
    if os.environ.get(VERBOSE) == "1":
        traceback.print_exception(error)
    ending = "".join(f"; {words}" for words in [safe()] if words)
    if memory := next(filter(lacks_memory, causes(error)), None):
        advice = less_memory()
        return FullMemoryError(f"{shortage(memory)}{f'; {advice}' if advice else ''}{ending}")
    if disk := disk_fault(error, folder, others=True):
        return MachineError(f"{disk}{ending}")
    return kind(f"{_fault(error, folder)}{ending}")


def _fault(error: Exception, folder: Path | None) -> str:
    """The line on a fault of llmtune, whose full text is written to a file."""
    frame = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    where = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
    kind = type(error).__name__
    line = f"a fault of llmtune, not of yours: {kind}: {first_line(error, 'without a message')[:LONGEST_LINE]}{where}"
    file = _write_full_text(error, folder)
    if file is None:
        return f"{line}; its full text could not be written; {VERBOSE}=1 prints it"
    return f"{line}; the full text is in {file}; please report it with that file and `llmtune --version`"


def _write_full_text(error: Exception, folder: Path | None) -> Path | None:
    """Write an exception's traceback, with versions and command, to a file in the folder, or to a temporary one."""
    torch = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    facts = f"llmtune {__version__}, Python {platform.python_version()}, torch {torch}, {platform.platform()}"
    head = f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{facts}\n{' '.join(sys.argv)}\n\n"
    text = head + "".join(traceback.format_exception(error))
    first = os.environ.get("RANK", "0") == "0"  # processes would write over each other's
    temporary = Path(tempfile.gettempdir()) / f"llmtune-error-{os.getpid()}.txt"
    for file in ([folder / ERROR_FILE] if folder and folder.is_dir() and first else []) + [temporary]:
        with contextlib.suppress(OSError):
            write_text(file, text)
            return file
    return None
