"""The errors that llmtune reports to the user, each with the exit code of its kind."""

import errno
import re
from collections.abc import Iterable, Iterator, Sequence

LONGEST_MESSAGE = 900
"""Characters of a message; what a user wrote and it repeats may be of any length."""
LONGEST_LINE = 300
"""Characters of a library's error in a message."""
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to) allocate|std::bad_alloc"
    r"|cudaErrorMemoryAllocation|_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate",
    re.IGNORECASE,
)
"""cuBLAS and cuDNN, which take memory of their own, say in words of theirs that a GPU has none left."""


class LlmtuneError(Exception):
    """A failure that the command reports in one line before it exits with the class's code."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message, LONGEST_MESSAGE))


class RecipeError(LlmtuneError):
    """The recipe or the data is wrong."""

    exit_code = 2


class FieldError(RecipeError):
    """A mistake at a dotted key of the recipe; `Recipe.located` adds file and line."""

    def __init__(self, key: str, message: str, kind: type[LlmtuneError] = RecipeError) -> None:
        super().__init__(f"{key}: {message}")
        self.key, self.message, self.kind = key, message, kind
        self.exit_code = kind.exit_code


class MachineError(LlmtuneError):
    """The machine lacks a GPU, disk, memory, a package or the network."""

    exit_code = 3


class FullMemoryError(MachineError):
    """Too little memory is free, on the GPU or on this machine."""


class TrainingError(LlmtuneError):
    """Training failed, or the model would have learned nothing."""

    exit_code = 4


class ProofError(LlmtuneError):
    """Evaluation, merge or parity failed."""

    exit_code = 5


class PublishError(LlmtuneError):
    """Publishing failed; the trained weights are untouched."""

    exit_code = 6


class Interrupted(LlmtuneError):  # noqa: N818
    """The user stopped the run; a checkpoint holds its state."""

    exit_code = 130


def one_line(text: str, limit: int) -> str:
    """Return a text with control characters and lone surrogates escaped, and its middle left out over `limit`."""
    shown = "".join(char if _is_visible(char) else ascii(char)[1:-1] for char in _shorten(text, limit))
    return _shorten(shown, limit)


def first_line(error: BaseException, without: str = "") -> str:
    """Return the first line of an error's text; for one that has none `without`, or its class's name."""
    return (str(error).strip().splitlines() or [without or type(error).__name__])[0]


def _is_visible(char: str) -> bool:
    return (
        char >= " " and not "\x7f" <= char <= "\x9f" and not "\ud800" <= char <= "\udfff" and char not in "\u2028\u2029"
    )


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} ... {text[-limit // 3 + 5 :]}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The ending `; did you mean ...?` for a message, or "" where no known word is as close as `cutoff`, at most 1."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_word(option: str, word: str, known: Sequence[str]) -> None:
    """Raise RecipeError, with the nearest word, for one that an option does not take."""
    if word not in known:
        hint = nearest(word, known, 0.4) or f"; it takes {', '.join(known)}"
        raise RecipeError(f"{option} {word[:100]}: is not one of these{hint}")


class PlanError(ValueError):
    """A method that is contradictory or does not fit the model; `key` is dotted and relative to its section."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, ten at the most."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that memory is full, on a CPU or a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
