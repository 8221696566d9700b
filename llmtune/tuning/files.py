"""What a search keeps in its folder, by which the process that leads it and the ones that train speak to each other.

They share nothing but this folder, which may lie on a network disk: one file is written by one side alone.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, cast

from llmtune.arms.record import Point
from llmtune.files import delete, read_json, write_json, write_text


class TrialTask(TypedDict):
    """What a worker is to train."""

    set: list[str]
    """The overrides of the search's recipe."""
    validation: str | None
    """Names the rows that losses are measured on; None where they are not known yet."""


class TrialResult(TypedDict):
    """What came of a trial, as its worker tells it."""

    state: Literal["complete", "pruned", "failed"]
    loss: NotRequired[float | None]
    steps: NotRequired[int]
    total: NotRequired[int]
    """Steps of the whole training."""
    seconds: NotRequired[float]
    validation: NotRequired[str]
    reason: NotRequired[str]
    """Why it failed."""
    exit_code: NotRequired[int]
    """Of the error that ended it."""


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial: its values, its validations so far, whether it is to end, and what came of it."""

    path: Path

    @property
    def log(self) -> Path:
        """What its training printed."""
        return self.path / "log.txt"

    @property
    def run(self) -> Path:
        """The run in which it trains, which is removed at its end."""
        return self.path / "run"

    def begin(self, task: TrialTask) -> None:
        """Write what is to be trained."""
        write_json(self.path / "trial.json", task)

    def task(self) -> TrialTask:
        """What is to be trained."""
        return cast(TrialTask, read_json(self.path / "trial.json"))

    def clear(self) -> None:
        """Forget the validations of a training that ended with its process."""
        (self.path / "curve.jsonl").unlink(missing_ok=True)

    def add(self, number: int, point: Point) -> bool:
        """Add a validation; gives whether the training is to end."""
        with (self.path / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return self.is_stopped()

    def curve(self) -> list[Point]:
        """The validations so far."""
        with contextlib.suppress(OSError):
            lines = (self.path / "curve.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            return [json.loads(line) for line in lines]
        return []

    def stop(self, reason: str) -> None:
        """Have the training end at its next validation."""
        write_text(self.path / "stop", reason)

    def stops(self) -> str:
        """Why the training is to end at its next validation; "" where it is not."""
        with contextlib.suppress(OSError):
            return (self.path / "stop").read_text(encoding="utf-8")
        return ""

    def is_stopped(self) -> bool:
        """Whether the training is to end."""
        return bool(self.stops())

    def end(self, result: TrialResult) -> None:
        """Write what came of the training."""
        write_json(self.path / "result.json", result)

    def result(self) -> TrialResult | None:
        """What came of the training; None before its end."""
        file = self.path / "result.json"
        return cast(TrialResult, read_json(file)) if file.is_file() else None


@dataclass(frozen=True)
class Folder:
    """The folder of a search."""

    path: Path

    @property
    def study(self) -> Path:
        """Optuna's SQLite file."""
        return self.path / "study.db"

    @property
    def recipe(self) -> Path:
        """The recipe that trials override, with absolute paths."""
        return self.path / "recipe.yaml"

    @property
    def best(self) -> Path:
        """The recipe with the best values."""
        return self.path / "best.yaml"

    @property
    def record(self) -> Path:
        """The trials and the best of them, as plain values."""
        return self.path / "tune.json"

    @property
    def page(self) -> Path:
        """A page that opens offline."""
        return self.path / "index.html"

    @property
    def lock(self) -> Path:
        """Keeps a second search out."""
        return self.path / ".lock"

    def worker_log(self, worker: int) -> Path:
        """What a worker printed outside of trials."""
        return self.path / "workers" / f"{worker}.log"

    def trial(self, number: int) -> TrialFolder:
        """The folder of a trial."""
        return TrialFolder(self.path / "trials" / str(number))

    def remove_leftovers(self) -> None:
        """Remove the runs of trials whose processes were killed."""
        for run in self.path.glob("trials/*/run"):
            delete(run)

    def send(self, worker: int, trial: int | None) -> None:
        """Tell a worker which trial comes next; None for the end."""
        write_json(self.path / "workers" / f"{worker}.json", {"trial": trial})

    def sent(self, worker: int) -> dict[str, int | None] | None:
        """What a worker was told: `trial`, None for the end; None where nothing was sent yet."""
        file = self.path / "workers" / f"{worker}.json"
        return dict(read_json(file)) if file.is_file() else None
