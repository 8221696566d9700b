"""Signal handlers for the length of a block."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each signal of these; afterwards the handlers are those from before."""
    before = {number: signal.signal(number, lambda caught, _frame: handler(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """The signals of these that this process does not ignore, as it does SIGHUP under nohup."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
