"""Whatever ends a step becomes one line: what the machine lacks, or a fault of llmtune with its full text in a file."""

import contextlib
import errno
import os
import platform
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from llmtune import __version__
from llmtune.errors import LONGEST_LINE, FullMemoryError, LlmtuneError, MachineError, causes, first_line, lacks_memory
from llmtune.files import ERROR_FILE, write_text
from llmtune.machine.shortage import shortage
from llmtune.numbers import size

VERBOSE = "LLMTUNE_VERBOSE"
"""Set to 1, it has the full text of what ends a step printed too."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EIO: "the disk reports an input/output error",
    errno.EFBIG: "the file is larger than its file system, or `ulimit -f`, allows",
    errno.EMFILE: "too many files are open; `ulimit -n` raises the limit",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOENT: "no such file or folder; was it removed while llmtune ran?",
    errno.ESTALE: "the network disk lost it",
}
_HIDDEN_ERRNO = re.compile(r"os error (\d+)|\[Errno (\d+)\]")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container")

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
    chain = list(causes(error))
    if memory := next((one for one in chain if lacks_memory(one)), None):
        advice = less_memory()
        return FullMemoryError(f"{shortage(memory)}{f'; {advice}' if advice else ''}{ending}")
    if disk := next((words for one in chain if (words := _disk_fault(one, folder))), None):
        notes = [note for one in chain for note in getattr(one, "__notes__", [])]
        return MachineError(f"{'; '.join([disk, *notes])}{ending}")
    return kind(f"{_fault(error, folder)}{ending}")


def _disk_fault(error: BaseException, folder: Path | None) -> str | None:
    """What a disk lacks, in words, for an error of the system or of a library that wraps one; else None."""
    number, file = _number(error), getattr(error, "filename", None)
    place = Path(os.fsdecode(file)) if isinstance(file, (str, bytes)) else folder
    if number is None and not _TORCH_WRITER.search(str(error)):
        return None
    free = f" ({_free(place)})" if number is None or number in _FULL else ""
    reason = "a file could not be written" if number is None else _REASONS.get(number) or os.strerror(number)
    return f"{f'{place}: ' if place else ''}{reason}{free}"


def _number(error: BaseException) -> int | None:
    """The system's number of an error, which libraries may hide in their own message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    hidden = _HIDDEN_ERRNO.search(str(error))
    return int(hidden[1] or hidden[2]) if hidden else None


def _free(place: Path | None) -> str:
    """How much space is free on the disk of a file or folder, in words."""
    place = (place or Path(tempfile.gettempdir())).absolute()
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    usage = shutil.disk_usage(nearest)
    return f"{size(usage.free)} of {size(usage.total)} free"


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
