"""Completes a checkpoint beside the training's next steps: disks and hashes take longer than copying its content."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from operator import call

from llmtune.errors import first_line


class Sealing:
    """Runs what completes a checkpoint in a thread, one at a time; a failure is raised once another one was tried."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> "Sealing":
        """Begin a training, at whose end nothing is left to be completed."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait, whatever ended the training; a failure is raised, or told where the training ended with another one."""
        try:
            self._wait()
        except Exception as failure:
            if error is None:
                raise
            print(f"llmtune: the newest checkpoint could not be completed: {first_line(failure)}", file=sys.stderr)

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be completed, so that another one is to be written now."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    @contextmanager
    def after_the_last(self, beside: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Wait for the checkpoint before; give what runs the function that completes this one, `beside` or at once.

        Where the one before failed, this one is completed at once; then that failure is raised, and none of this one.
        """
        try:
            self._wait()
        except Exception:  # what was learned since is saved first: the disk may have room again
            with suppress(Exception):
                yield call
            raise
        yield self._begin if beside else call

    def _begin(self, complete: Callable[[], None]) -> None:
        self._running = self._threads.submit(complete)

    def _wait(self) -> None:
        """Wait until no checkpoint is being completed; raises what completing it raised, once."""
        if self._running is not None:
            failure = self._running.exception()  # a stop that comes meanwhile leaves it to the next call
            self._running = None
            if failure is not None:
                raise failure
