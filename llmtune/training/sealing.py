"""Completes a checkpoint beside the training's next steps: disks and hashes take longer than copying its content."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Sealing:
    """Runs what completes a checkpoint in a thread, one at a time; what fails there is raised by the next `wait`."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> "Sealing":
        """Begin a training, at whose end nothing is left to be completed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait, and raise what failed, whatever ended the training."""
        self.wait()

    def begin(self, complete: Callable[[], None], beside: bool) -> None:
        """Run a function: `beside` this thread, once the one before is done; else at once."""
        self.wait()
        if beside:
            self._running = self._threads.submit(complete)
        else:
            complete()

    def wait(self) -> None:
        """Wait until no checkpoint is being completed; raises what completing it raised, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
