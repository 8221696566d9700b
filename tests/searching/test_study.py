"""A study goes on where it was left, gives the same values again, prunes, and refuses files of anything else."""

import sqlite3
from pathlib import Path

import pytest

from llmtune.errors import MachineError, RecipeError
from llmtune.searching.space import Choice, Range, Space, Values, combinations, overrides
from llmtune.searching.study import ENDED, Study

SPACE: Space = {"method.lr": Range(1e-5, 1e-2, log=True), "method.adapter.rank": Choice((8, 16))}
OWN: Values = {"method.lr": 1e-3, "method.adapter.rank": 8}


def opened(file: Path, **facts: object) -> Study:
    """A study of SPACE, in which a recipe's own values come first."""
    return Study.open(file, facts or {"train.epochs": 1}, SPACE, seed=3, first=[OWN])


def rate_of(values: Values) -> float:
    """The learning rate among values."""
    rate = values["method.lr"]
    assert isinstance(rate, float)
    return rate


def test_goes_on_with_the_values_that_an_uninterrupted_study_draws(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = opened(tmp_path / "a.db")
    asked = []
    for _ in range(7):
        trial = whole.ask()
        asked.append(trial.values)
        trial.tell(rate_of(trial.values), steps=4)
    for part in (range(3), range(3, 7)):
        study = opened(tmp_path / "b.db")
        for number in part:
            trial = study.ask()
            assert (trial.number, trial.values) == (number, asked[number])
            trial.tell(rate_of(trial.values))
    assert asked[0] == OWN
    assert len({one["method.lr"] for one in asked}) == 7
    assert whole.best
    assert whole.best.loss == min(map(rate_of, asked))
    assert whole.best.facts == {"steps": 4}
    assert capfd.readouterr() == ("", "")


def test_asks_again_for_what_a_killed_process_trained(tmp_path: Path) -> None:
    assert opened(tmp_path / "study.db").ask().values == OWN
    study = opened(tmp_path / "study.db")
    assert (study.trials[0].state, study.trials[0].reason) == ("failed", ENDED)
    assert study.ask().values == OWN


def test_ends_trials_that_are_behind_and_keeps_failures(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    for loss in (1.0, 1.1, 1.2):
        trial = study.ask()
        assert not any(trial.report(number, loss) for number in range(1, 6))
        trial.tell(loss)
    late = study.ask()
    assert [late.report(number, 2.0) for number in (1, 2, 3)] == [False, False, True]
    late.prune(reason="behind")
    study.ask().tell(float("nan"))
    assert [(one.state, one.loss, one.reason) for one in study.trials[3:]] == [
        ("pruned", 2.0, "behind"),
        ("failed", None, "its loss is nan"),
    ]


def test_refuses_files_of_anything_else(tmp_path: Path) -> None:
    opened(tmp_path / "study.db")
    with pytest.raises(RecipeError, match=r"holds another study \(train.epochs is 1 there and 2 here\)"):
        opened(tmp_path / "study.db", **{"train.epochs": 2})
    (tmp_path / "text.db").write_text("no database, " * 99)
    with pytest.raises(RecipeError, match="is no SQLite file"):
        opened(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "own.db") as own:
        own.execute("create table mine(a)")
    with pytest.raises(RecipeError, match="is a database without studies"):
        opened(tmp_path / "own.db")


def test_tells_in_one_line_that_its_file_is_gone(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    trial = study.ask()
    (tmp_path / "study.db").write_bytes(b"")
    for use in (study.ask, lambda: study.trials, lambda: trial.report(1, 1.0), lambda: trial.tell(1.0)):
        with pytest.raises(MachineError, match=r"study\.db: cannot be written"):
            use()


def test_writes_values_as_a_recipe_reads_them() -> None:
    values: Values = {"a": 1e-05, "b": 8, "c": 0.1 + 0.2, "d": "[q, k]"}
    assert overrides(values) == ["a=1.0e-05", "b=8", "c=0.30000000000000004", "d=[q, k]"]
    words: Space = {"a": Choice((1, 2)), "b": Choice(("x", "y"))}
    assert combinations(words, 4) == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    assert combinations(words, 3) is None
    assert combinations(SPACE, 99) is None
