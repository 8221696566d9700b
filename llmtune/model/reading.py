"""The boundary to the libraries that read a base: whatever they raise becomes one line, and hanging code is stopped."""

import contextlib
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from llmtune.errors import FieldError, LlmtuneError, MachineError, RecipeError, lacks_memory

_LONGEST = 240
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\s]+")
_SPEAKS = ("ValueError", "OSError", "ImportError", "TooMuch", "TemplateError", "StrictDataclassFieldValidationError")
_STATM = Path("/proc/self/statm")


class TooMuch(BaseException):
    """What ran within bounds took too long; no Exception, as libraries catch those and go on."""


@contextlib.contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn any exception into a FieldError of one line: the base of that name, and what of it cannot be read.

    Its kind is MachineError for a missing package and for too little memory, else RecipeError.
    """
    try:
        yield
    except (LlmtuneError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception either
        if lacks_memory(error) and not isinstance(error, MemoryError):
            raise  # of the machine, not of the base: who trains or evaluates knows what needs less
        kind = MachineError if isinstance(error, ImportError | MemoryError) else RecipeError
        raise FieldError("model.base", f"{name}: {what} cannot be read: {error_words(error)}", kind) from error


def error_words(error: BaseException) -> str:
    """The first line of an error's text, shortened; after the error's name where the text alone says little."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which llmtune never runs"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    lines = [line for line in (_UNPRINTABLE.sub(" ", part).strip() for part in str(error).splitlines()) if line]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    short = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    if any(kind.__name__ in _SPEAKS for kind in type(error).__mro__) and " " in short:
        return short
    return f"{type(error).__name__}: {short}" if short else type(error).__name__


@contextlib.contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Raise TooMuch in a block that runs longer, MemoryError in one that needs so many bytes on top of what there is.

    It bounds nothing outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _alarm(seconds), _memory_limit(memory):
        yield


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooMuch(f"it takes over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    waiting = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *waiting)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(_STATM.read_text().split()[0]) if _STATM.is_file() else None
    limit = pages * resource.getpagesize() + memory if pages else None
    if limit is None or any(bound != resource.RLIM_INFINITY and bound < limit for bound in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
