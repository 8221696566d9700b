"""Completes a checkpoint beside the training's next steps: disks and hashes take longer than copying its content."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llmtune.errors import first_line


class Sealing:
    """Runs what completes a checkpoint in a thread, one at a time; what fails there is raised by the next `wait`."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> "Sealing":
        """Begin a training, at whose end nothing is left to be completed."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait, whatever ended the training; a failure is raised, or told where the training ended with another one."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            print(f"llmtune: the last checkpoint was not completed: {first_line(failure)}", file=sys.stderr)

    def begin(self, complete: Callable[[], None], beside: bool) -> None:
        """Run a function: `beside` this thread, once the one before is done; else at once."""
        self.wait()
        if beside:
            self._running = self._threads.submit(complete)
        else:
            complete()

    def wait(self) -> None:
        """Wait until no checkpoint is being completed; raises what completing it raised, once."""
        if self._running is not None:
            failure = self._running.exception()  # a stop that comes meanwhile leaves it to the next `wait`
            self._running = None
            if failure is not None:
                raise failure
