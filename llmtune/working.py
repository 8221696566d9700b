"""Shows that something long goes on: a spinner or a bar on a terminal, elsewhere a line from time to time.

    with working("loading the base model"):
        ...
    with working("hashing model.safetensors", total=size, unit="bytes") as step:
        step(2**20)  # so much more is done
    with working("answering rows", total=500, unit="rows") as step:
        step()  # one more

It writes to stderr, so that results on stdout stay clean, and to stdout after `use_stdout()`, where progress is what
stdout holds. Outside a terminal, what takes less than 5 seconds prints nothing; then there is a line every 10 seconds.
With a `total`, the share that is done and the time left are shown. Of several processes of a training, the first on
each machine shows it. Blocks may be nested: the inner one is shown.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llmtune.numbers import count, duration, size

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY, INTERVAL = 5.0, 10.0
"""Seconds before the first line, and between two lines, outside a terminal."""
REFRESH = 0.2
"""Seconds between two looks on a terminal."""

Step = Callable[..., None]
"""Called with how much more is done, 1 where nothing is given."""


class Work:
    """One thing that goes on: its name, how much of `total` is done, and since when."""

    def __init__(
        self, name: str | Callable[[], str], total: float | None, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit = total, unit
        self._name = name
        self._clock = clock
        self._begin = clock()
        self._done = 0.0

    @property
    def name(self) -> str:
        """What goes on at this moment."""
        return self._name if isinstance(self._name, str) else self._name()

    def step(self, amount: float = 1) -> None:
        """Count that so much more is done."""
        self._done += amount

    @property
    def share(self) -> float | None:
        """The share that is done, from 0 to 1; None where the total is not known."""
        return min(1.0, self._done / self.total) if self.total else None

    def facts(self) -> str:
        """What is done of how much, and the time left; without a total, the time since it began."""
        spent = self._clock() - self._begin
        if not self.total:
            return f"for {duration(spent)}" if spent >= 1 else ""
        amount = size if self.unit == "bytes" else count
        unit = "" if self.unit == "bytes" else f" {self.unit}".rstrip()
        done = f"{amount(self._done)} of {amount(self.total)}{unit}"
        if not self._done:
            return done
        return f"{done}, {duration(spent / self._done * max(0.0, self.total - self._done))} left"


_STACK: list[Work] = []
"""What goes on now, the innermost last."""
_ON_STDOUT = threading.Event()


def use_stdout() -> None:
    """Print lines to stdout from now on, outside a terminal: it holds progress, so that stderr holds errors alone."""
    _ON_STDOUT.set()


@contextlib.contextmanager
def working(
    name: str | Callable[[], str], total: float | None = None, unit: str = "", on_terminal: bool = True
) -> Iterator[Step]:
    """Show that `name` goes on until the block ends; gives a function to call with how much more of `total` is done.

    A function in place of the name is asked whenever it is shown: what goes on may change. `unit` names what is
    counted, such as rows; bytes are shown as MB or GB. Without `on_terminal`, a terminal shows nothing: for work under
    a bar of its own.
    """
    work = Work(name, total, unit)
    _STACK.append(work)
    try:
        with _shown(on_terminal):
            yield work.step
    finally:
        _STACK.remove(work)


def importing() -> contextlib.AbstractContextManager[Step]:
    """Show that torch and what stands on it are imported, which takes seconds."""
    return working("loading torch and transformers")


def _shown(on_terminal: bool) -> contextlib.AbstractContextManager[None]:
    """Show what goes on in the way that fits where stderr goes; what shows an outer piece of work shows inner ones."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or len(_STACK) > 1:
        return contextlib.nullcontext()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _on_terminal() if on_terminal else contextlib.nullcontext()
    return _in_lines()


@contextlib.contextmanager
def _in_lines() -> Iterator[None]:
    """Print a line about the innermost work after a while, and then from time to time."""

    def print_line() -> None:
        stream = sys.stdout if _ON_STDOUT.is_set() else sys.stderr
        work = _STACK[-1]
        print(": ".join(text for text in (work.name, work.facts()) if text), file=stream, flush=True)

    with _repeating(print_line, DELAY, INTERVAL):
        yield


@contextlib.contextmanager
def _on_terminal() -> Iterator[None]:
    """Show the innermost work in the terminal's last line, which is removed at the end."""
    display = _display()
    task = display.add_task("", total=None, facts="")

    def refresh() -> None:
        work = _STACK[-1]
        share: dict[str, Any] = {"total": 1.0, "completed": work.share} if work.share is not None else {"total": None}
        display.update(task, description=work.name, facts=work.facts(), **share)

    display.update(task, description=_STACK[-1].name)
    with display, _repeating(refresh, REFRESH, REFRESH):
        yield


@contextlib.contextmanager
def _repeating(show: Callable[[], None], delay: float, interval: float) -> Iterator[None]:
    """Call `show` after `delay` seconds and then every `interval` seconds until the block ends, in a thread."""
    ended = threading.Event()

    def repeat() -> None:
        pause = delay
        while not ended.wait(pause):
            # The last work may have ended just now, or what shows it may be closed.
            with contextlib.suppress(OSError, ValueError, IndexError):
                show()
            pause = interval

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1)


def _display() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True, highlight=False)
    spinner = SpinnerColumn("dots" if console.encoding.lower().startswith("utf") else "line")
    columns = (spinner, TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
    return Progress(*columns, TextColumn("{task.fields[facts]}", markup=False), console=console, transient=True)
