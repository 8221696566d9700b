"""A run whose folder is on a store, while a command works on it: brought before, sent meanwhile and at the end."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llmtune.errors import MachineError, RecipeError, first_line
from llmtune.run import Run
from llmtune.storage.mirror import Mirror, TakenOver
from llmtune.storage.urls import stored_at
from llmtune.working import working

INTERVAL, LONGEST = 5.0, 60.0
"""Seconds between two looks at the folder; after failures they grow to the longest."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try, at the end."""


def fetch(folder: Path, must_exist: bool = False) -> None:
    """Bring what the store has of the run in a folder; nothing happens for a run that is on no store.

    What another process here works on is newer than the store, and stays. Raises MachineError where the store cannot
    be reached, and RecipeError where a run `must_exist` and none does.
    """
    url = stored_at(folder)
    if url is None:
        return
    run, mirror = Run(folder), Mirror(folder, url)
    try:
        if mirror.is_there():
            with run.locked():
                mirror.bring()
    except RecipeError:
        if not run.recipe_file.is_file():
            raise
    if must_exist and not run.recipe_file.is_file():
        raise RecipeError(f"{url}: holds no run; give the URL that `llmtune run RECIPE --out URL` wrote to")


@contextlib.contextmanager
def keep_stored(folder: Path) -> Iterator[None]:
    """Send to a run's store whatever the block completes in its folder, and the rest when the block ends.

    A store that is lost on the way is told in one line, and tried again. Raises MachineError where it cannot be written
    to before the block, or at the end; an error of the block goes first.
    """
    url = stored_at(folder)
    if url is None:
        yield
        return
    mirror = Mirror(folder, url)
    mirror.claim()
    print(f"store   {url}, worked on in {folder}", flush=True)
    sender = Sender(mirror)
    try:
        with sender.sending():
            yield
    except BaseException:
        with contextlib.suppress(MachineError):
            _send_rest(mirror, tell=True)
        raise
    _send_rest(mirror)
    print(f"store   everything is in {url}", flush=True)


class Sender:
    """Sends what a run completes, in a thread, while others work on it."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._ended = threading.Event()
        self._sent: object = None
        self._failures = 0

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send from time to time until the block ends."""
        thread = threading.Thread(target=self._repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _repeat(self) -> None:
        while not self._ended.wait(min(LONGEST, INTERVAL * 2**self._failures)):
            if self.look():
                return

    def look(self) -> bool:
        """Send where the run has come further since the last time; gives whether another machine took it over."""
        signature = self._mirror.signature()
        if signature == self._sent:
            return False
        try:
            self._mirror.send()
        except Exception as error:  # whatever it is, the work goes on, and the end says it again
            later = "" if isinstance(error, TakenOver) else "; the work goes on, and what is missing is sent later"
            if not self._failures:
                print(f"llmtune: note: {first_line(error)}{later}", file=sys.stderr, flush=True)
            self._failures += 1
            return isinstance(error, TakenOver)
        self._sent, self._failures = signature, 0
        return False


def _send_rest(mirror: Mirror, tell: bool = False) -> None:
    """Send what is not sent yet, in several tries; raises MachineError where none succeeds, `tell` prints it first."""
    for pause in (*PAUSES, None):
        try:
            with working(f"sending to {mirror.url}", mirror.unsent() or None, "bytes") as step:
                mirror.send(step)
            return
        except MachineError as error:
            if pause is not None and not isinstance(error, TakenOver):
                time.sleep(pause)
                continue
            message = f"{error}; the run is whole in {mirror.folder}: llmtune run {mirror.folder} sends the rest"
            message = str(error) if isinstance(error, TakenOver) else message
            if tell:
                print(f"llmtune: {message}", file=sys.stderr)
            raise MachineError(message) from error
