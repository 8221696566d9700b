"""Shows that something long goes on: a spinner or a bar on a terminal, elsewhere a line from time to time.

    with working("loading the base model"):
        ...
    with working("hashing model.safetensors", total=size, unit="bytes") as step:
        step(2**20)  # so much more is done
    with working("answering rows", total=500, unit="rows") as step:
        step()  # one more

It writes to stderr, so that results on stdout stay clean, and to stdout after `use_stdout()`, where progress is what
stdout holds. Outside a terminal, what takes less than 5 seconds prints nothing; then there is a line every 10 seconds.
The first imports of a process print theirs at once. With a `total`, the share that is done and the time left are shown.
Of several processes of a training, the first on each machine shows it. Blocks may be nested: the inner one is shown.
"""

import contextlib
import gc
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
_TELLING = 0.001
"""The share that must be done before it tells how long the rest will take."""
REFRESH = 0.2
"""Seconds between two looks on a terminal."""

Step = Callable[..., None]
"""Called with how much more is done, 1 where nothing is given, and the seconds that it took before the block began."""


class Work:
    """One thing that goes on: its name, how much of `total` is done, and since when."""

    def __init__(
        self, name: str | Callable[[], str], total: float | None, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit = total, unit
        self._name = name
        self._clock = clock
        self._begin = clock()
        self._done = self._earlier = 0.0

    @property
    def name(self) -> str:
        """What goes on at this moment."""
        return self._name if isinstance(self._name, str) else self._name()

    def step(self, amount: float = 1, earlier: float = 0.0) -> None:
        """Count that so much more is done; `earlier` are seconds that it took before this work began."""
        self._done += amount
        self._earlier += earlier

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
        if self._done < _TELLING * self.total:
            return done
        pace = (spent + self._earlier) / self._done
        return f"{done}, {duration(pace * max(0.0, self.total - self._done))} left"


_STACK: list[Work] = []
"""What goes on now, the innermost last."""
_ON_STDOUT = threading.Event()
_OWN = threading.Event()
_NOT_COMPILED = "TORCHDYNAMO_DISABLE"
"""Set to 1, torch compiles nothing. It is read where a function is handed to torch.compile: at import, for some."""


def use_stdout() -> None:
    """Print lines to stdout from now on, outside a terminal: it holds progress, so that stderr holds errors alone."""
    _ON_STDOUT.set()


@contextlib.contextmanager
def working(
    name: str | Callable[[], str],
    total: float | None = None,
    unit: str = "",
    on_terminal: bool = True,
    at_once: bool = False,
) -> Iterator[Step]:
    """Show that `name` goes on until the block ends; gives a function to call with how much more of `total` is done.

    A function in place of the name is asked whenever it is shown: what goes on may change. `unit` names what is
    counted, such as rows; bytes are shown as MB or GB. Without `on_terminal`, a terminal shows nothing: for work under
    a bar of its own. With `at_once`, the first line does not wait.
    """
    work = Work(name, total, unit)
    _STACK.append(work)
    try:
        with _shown(on_terminal, at_once):
            yield work.step
    finally:
        _STACK.remove(work)


def own_process() -> None:
    """Note that this process is llmtune's alone, so that `importing` may settle it for good: no caller's code runs."""
    _OWN.set()


@contextlib.contextmanager
def importing(name: str = "loading torch and transformers") -> Iterator[Step]:
    """Show, from the first one on at once, that torch and what stands on it are imported, which takes seconds."""
    first = "transformers" not in sys.modules  # torch alone may be there: it counts GPUs
    with working(name, at_once=first) as step, _imports_alone(first and _OWN.is_set()):
        yield step


@contextlib.contextmanager
def _imports_alone(settle: bool) -> Iterator[None]:
    """Let the block import modules and do nothing else: no garbage is looked for among the objects that they keep.

    With `settle`, it is never looked for there again, nor at the end of the process, which takes longer than the rest
    of it; and functions that bitsandbytes asks torch to compile are not, for which torch would load its compiler.
    """
    collecting, compiling = gc.isenabled(), os.environ.get(_NOT_COMPILED)
    gc.disable()
    if settle and compiling is None:
        os.environ[_NOT_COMPILED] = "1"
    try:
        yield
    finally:
        if settle:
            gc.freeze()
            if compiling is None:
                del os.environ[_NOT_COMPILED]
        if collecting:
            gc.enable()


def _shown(on_terminal: bool, at_once: bool) -> contextlib.AbstractContextManager[None]:
    """Show what goes on in the way that fits where stderr goes; what shows an outer piece of work shows inner ones."""
    if os.environ.get("LOCAL_RANK", "0") != "0" or len(_STACK) > 1:
        return contextlib.nullcontext()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return _on_terminal() if on_terminal else contextlib.nullcontext()
    return _in_lines(at_once)


@contextlib.contextmanager
def _in_lines(at_once: bool) -> Iterator[None]:
    """Print a line about the innermost work after a while or at once, and then from time to time."""

    def print_line() -> None:
        stream = sys.stdout if _ON_STDOUT.is_set() else sys.stderr
        work = _STACK[-1]
        print(": ".join(text for text in (work.name, work.facts()) if text), file=stream, flush=True)

    if at_once:
        with contextlib.suppress(OSError, ValueError):
            print_line()
    with _repeating(print_line, INTERVAL if at_once else DELAY, INTERVAL):
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
