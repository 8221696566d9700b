"""A search deals trials to workers over files, ends those that are behind, and keeps to its minutes."""

from pathlib import Path

import pytest

from llmtune.searching.space import Range
from llmtune.searching.study import Study
from llmtune.tuning.dealer import HOPELESS, Dealer
from llmtune.tuning.files import Folder, TrialFolder


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def dealer(folder: Path, workers: int, clock: Clock | None = None, **limits: float | None) -> Dealer:
    """A dealer of a new study, or of the one in the folder."""
    space = {"method.lr": Range(1e-5, 1e-2, log=True)}
    study = Study.open(folder / "study.db", {"x": 1}, space)
    return Dealer(study, Folder(folder), workers, clock=clock or Clock(), **limits)  # type: ignore[arg-type]


def trial_of(one: Dealer, worker: int) -> TrialFolder | None:
    """The trial that a worker is told to train."""
    number = (one.folder.sent(worker) or {}).get("trial")
    return None if number is None else one.folder.trial(number)


def train(trial: TrialFolder | None, loss: float, rows: str = "rows") -> None:
    """Train as a worker does, to the end unless it is told to stop."""
    assert trial
    for number in range(1, 11):
        trial.add(number, {"step": number, "seconds": 1.0, "loss": loss})
    trial.end({"state": "complete", "loss": loss, "steps": 10, "total": 10, "validation": rows})


def test_deals_to_workers_and_ends_what_is_behind(tmp_path: Path) -> None:
    one = dealer(tmp_path, 2, trials=6)
    for loss in (1.0, 1.1):
        one.look()
        for worker in range(2):
            train(trial_of(one, worker), loss)
    one.look()
    late, other = trial_of(one, 0), trial_of(one, 1)
    assert late
    assert other
    assert late.task()["validation"] == "rows"
    for number in (1, 2, 3):
        late.add(number, {"step": number, "seconds": 1.0, "loss": 5.0})
    one.look()
    assert late.stops() == "behind the others at validation 3"
    assert not other.stops()
    late.end({"state": "pruned", "loss": 5.0, "validation": "rows"})
    train(other, 0.5, rows="others")
    one.look()
    one.look()
    assert one.is_over
    assert [one.folder.sent(worker) for worker in range(2)] == [{"trial": None}] * 2
    assert [tried.state for tried in one.study.trials] == ["complete"] * 4 + ["pruned", "failed"]
    assert "do not compare" in one.study.trials[-1].reason


def test_keeps_to_its_minutes_over_several_times(tmp_path: Path) -> None:
    clock = Clock()
    one = dealer(tmp_path, 1, clock, seconds=100)
    one.look()
    clock.now = 60.0
    train(trial_of(one, 0), 1.0)
    one.close()
    again = dealer(tmp_path, 1, clock, seconds=100)
    again.look()
    assert again.seconds_left() == pytest.approx(40)
    clock.now = 101.0
    again.look()
    trial = trial_of(again, 0)
    assert trial
    assert trial.stops() == "out of time"
    trial.end({"state": "pruned", "loss": None, "validation": "rows"})
    again.look()
    assert again.is_over
    assert [tried.reason for tried in again.study.trials] == ["", "out of time"]


def test_a_lost_worker_fails_its_trial_and_a_hopeless_search_ends(tmp_path: Path) -> None:
    one = dealer(tmp_path, 2, trials=9)
    one.look()
    one.lost(0, "was killed (signal 9)")
    one.look()
    assert one.study.trials[0].reason == "was killed (signal 9)"
    assert not one.is_over
    for _ in range(HOPELESS - 1):
        trial = trial_of(one, 1)
        assert trial
        trial.end({"state": "failed", "reason": "out of memory", "exit_code": 3})
        one.look()
    assert one.is_hopeless
    assert one.is_over
    assert one.exit_code == 3
