"""Gives workers their trials and takes what comes of them: the one process that reads and writes the study."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from llmtune.searching.space import overrides
from llmtune.searching.study import ENDED, Study, Trial, Tried
from llmtune.tuning.files import Folder, TrialFolder, TrialResult

POLL = 0.1
"""Seconds between two looks at the folder."""
HOPELESS = 3
"""Trials that fail before any other comes to a loss, after which no more are begun."""
_VALIDATION = "validation"


@dataclass
class Open:
    """A trial that a worker has."""

    trial: Trial
    folder: TrialFolder
    reported: int = 0
    stopped: bool = False


class Dealer:
    """Leads a search: which worker trains what, which trials are behind and end early, and when there are enough."""

    def __init__(
        self,
        study: Study,
        folder: Folder,
        workers: int,
        *,
        trials: int | None = None,
        seconds: float | None = None,
        began: Callable[[Trial], object] = lambda trial: None,
        validated: Callable[[], object] = lambda: None,
        ended: Callable[[Tried], object] = lambda tried: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`trials` and `seconds` are of the whole search, what it had before included; the last three are told."""
        self.study, self.folder = study, folder
        self._trials, self._seconds, self._clock = trials, seconds, clock
        self._began, self._validated, self._ended = began, validated, ended
        self._workers = set(range(workers))
        self._open: dict[int, Open] = {}
        self._gone: list[tuple[int, str]] = []
        self._lock = threading.Lock()
        self._spent, self._since = study.seconds, clock()
        self.exit_code = 0
        """The code of the latest failure."""

    @property
    def is_over(self) -> bool:
        """Whether no trial is open, and none is to begin."""
        return not self._open and not self._may_begin()

    @property
    def is_hopeless(self) -> bool:
        """Whether all trials so far failed, and they are enough to tell that others would."""
        states = [tried.state for tried in self.study.ended]
        return len(states) >= HOPELESS and set(states) == {"failed"}

    def seconds_left(self) -> float | None:
        """Seconds until the minutes are over; None where they are not limited."""
        return None if self._seconds is None else self._seconds - self._spent - (self._clock() - self._since)

    def lost(self, worker: int, message: str) -> None:
        """Tell that a worker's process ended, from any thread."""
        with self._lock:
            self._gone.append((worker, message))

    def renew(self, workers: int) -> None:
        """Take so many new workers in place of those that are gone."""
        with self._lock:
            self._gone.clear()
        self._workers = set(range(workers))

    def serve(self, until: threading.Event) -> None:
        """Look again and again until the event is set."""
        while not until.wait(POLL):
            self.look()

    def look(self) -> None:
        """Take what workers left, end trials that are behind or out of time, and give out the next ones."""
        self._collect()
        for worker in sorted(self._workers - set(self._open)):
            if self._may_begin():
                self._begin(worker)
            elif (self.folder.sent(worker) or {}).get("trial", 0) is not None:
                self.folder.send(worker, None)

    def close(self) -> None:
        """Take what is there still, and count the time that was spent; trials that are open are tried again."""
        self._collect()
        self.study.spend(self._clock() - self._since)
        self._spent, self._since = self.study.seconds, self._clock()

    def _collect(self) -> None:
        """Take what workers left; the trials of those that are gone failed."""
        for worker, one in list(self._open.items()):
            self._read(worker, one)
        with self._lock:
            gone, self._gone = self._gone, []
        for worker, message in gone:
            self._workers.discard(worker)
            if worker in self._open:
                self._finish(worker, {"state": "failed", "reason": message or ENDED})

    def _may_begin(self) -> bool:
        """Whether there is a trial to begin, and time for it."""
        done = len(self.study.ended) + len(self._open)
        if (self._trials is not None and done >= self._trials) or self.is_hopeless:
            return False
        left = self.seconds_left()
        if left is None:
            return True
        took = [tried.seconds for tried in self.study.ended if tried.state == "complete"]
        return left > (median(took) if took else 0.0)

    def _begin(self, worker: int) -> None:
        trial = self.study.ask()
        folder = self.folder.trial(trial.number)
        folder.begin({"set": overrides(trial.values), "validation": self.study.noted(_VALIDATION)})
        self._open[worker] = Open(trial, folder)
        self.folder.send(worker, trial.number)
        self._began(trial)

    def _read(self, worker: int, one: Open) -> None:
        """Report a trial's new validations, and take its result where there is one."""
        result = one.folder.result()
        for number, point in enumerate(one.folder.curve(), 1):
            if number <= one.reported:
                continue
            one.reported = number
            self._validated()
            if one.trial.report(number, point["loss"]):
                self._stop(one, f"behind the others at validation {number}")
        left = self.seconds_left()
        if left is not None and left <= 0:
            self._stop(one, "out of time")
        if result is not None:
            self._finish(worker, result)

    def _stop(self, one: Open, reason: str) -> None:
        if not one.stopped:
            one.stopped = True
            one.folder.stop(reason)

    def _finish(self, worker: int, result: TrialResult) -> None:
        """Tell the study what came of a trial."""
        one = self._open.pop(worker)
        rows, known = result.get("validation"), self.study.noted(_VALIDATION)
        if rows and known is None:
            self.study.note(_VALIDATION, rows)
        facts: dict[str, Any] = {"points": one.folder.curve()}
        facts |= {key: value for key, value in result.items() if key in ("steps", "total")}
        if result["state"] == "complete" and rows != (known or rows):
            one.trial.fail("its validation rows are not those of other trials, so losses do not compare", **facts)
        elif result["state"] == "complete":
            loss = result.get("loss")
            one.trial.tell(math.nan if loss is None else loss, **facts)
        elif result["state"] == "pruned":
            one.trial.prune(reason=one.folder.stops(), **facts)
        else:
            self.exit_code = int(result.get("exit_code", 4))
            one.trial.fail(result.get("reason", ENDED), **facts)
        self._ended(next(tried for tried in self.study.trials if tried.number == one.trial.number))
