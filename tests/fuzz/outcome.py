"""The rules for whatever a user may hand in: it is accepted, or refused in one clean line, within 10 seconds."""

import contextlib
import io
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console

from llmtune import terminal
from llmtune.errors import LlmtuneError

LIMIT_S = 10.0
"""CPU seconds that a case may take: other work on the machine stretches wall time."""
BLOCKED_S = 120.0
"""Seconds after which a case that uses no CPU waits for something that never comes."""
LINE = 1000
CODES = (2, 3)


class Hang(BaseException):
    """A case ran over its time; no handler of llmtune catches it."""


class BrokenRuleError(AssertionError):
    """A case that neither was accepted nor refused in one clean line, or was accepted and ignored."""


class Tally:
    """Counts what became of the cases of a test."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def judge(self, run: Callable[[], None]) -> None:
        """Run a case and count its outcome; a traceback escapes, and any other broken rule raises BrokenRuleError."""
        began = _cpu_seconds()
        self.outcomes["inputs"] += 1
        try:
            with _limited(), _strict_output():
                run()
            self.outcomes["accepted"] += 1
        except LlmtuneError as error:
            self._check_refusal(error)
        except BrokenRuleError:
            self.outcomes["ignored"] += 1
            raise
        except Hang as error:
            self.outcomes["hangs"] += 1
            raise BrokenRuleError(f"ran over {LIMIT_S:.0f} s of CPU, or waited over {BLOCKED_S:.0f} s") from error
        except Exception:
            self.outcomes["tracebacks"] += 1
            raise
        finally:
            self.slowest = max(self.slowest, _cpu_seconds() - began)

    def _check_refusal(self, error: LlmtuneError) -> None:
        problems = unclean(str(error), error.exit_code)
        self.outcomes["unclean" if problems else "refused"] += 1
        if problems:
            raise BrokenRuleError(f"{', '.join(problems)}: {str(error)[:300]!r}") from error

    def __str__(self) -> str:
        kinds = ("inputs", "accepted", "refused", "tracebacks", "hangs", "unclean", "ignored")
        counts = ", ".join(f"{self.outcomes[kind]:,} {kind}" for kind in kinds)
        return f"{counts}; the slowest took {self.slowest:.1f} s"


def unclean(text: str, code: int) -> list[str]:
    """What keeps an error's message from being one clean line with exit code 2 or 3."""
    problems = []
    if code not in CODES:
        problems.append(f"exit code {code}")
    if len(text) > LINE:
        problems.append(f"{len(text)} characters")
    if not text.strip():
        problems.append("says nothing")
    if any(_breaks_line(character) for character in text):
        problems.append("more than one line, control characters or half of a surrogate pair")
    return problems


def _breaks_line(character: str) -> bool:
    code = ord(character)
    return code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000 or character in "\u2028\u2029"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise Hang, again and again, in a block that runs over the limit."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    clocks = ((signal.ITIMER_PROF, signal.SIGPROF, LIMIT_S), (signal.ITIMER_REAL, signal.SIGALRM, BLOCKED_S))
    before = [signal.signal(number, stop) for _, number, _ in clocks]
    try:
        for clock, _, seconds in clocks:
            signal.setitimer(clock, seconds, 1.0)
        yield
    finally:
        for (clock, number, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(clock, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def _strict_output() -> Iterator[None]:
    """Take what is printed as a UTF-8 terminal does, which refuses half of a surrogate pair."""
    console = terminal.console
    terminal.console = Console(highlight=False, soft_wrap=True)
    try:
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
            yield
    finally:
        terminal.console = console
