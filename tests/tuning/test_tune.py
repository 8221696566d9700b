"""A search from end to end: its trials train, it goes on, and it leaves a recipe that runs, a study and a page."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest

from llmtune import recipe
from llmtune.methods.full import Full
from llmtune.pool import Ended, Task
from llmtune.searching.space import Range
from llmtune.searching.study import Study
from llmtune.tuning import step, worker
from tests.support import tiny


class Here:
    """A pool that runs its tasks in this process."""

    def width(self, gpus: int = 0) -> int:
        return 1

    def run(self, tasks: Sequence[Task], ended: Callable[[Ended], None]) -> None:
        for task in tasks:
            assert task.module == step.MODULE
            ended(Ended(task, worker.main(list(task.words))))


def test_leaves_the_best_recipe_a_study_and_a_page_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "open_pool", lambda on, folder: Here())
    monkeypatch.setattr(worker, "POLL", 0.01)
    monkeypatch.setattr("llmtune.tuning.dealer.POLL", 0.01)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(20))
    file = tiny.write_recipe(tmp_path / "mine.json", tiny.save_base(tmp_path / "base"), rows)
    over, out = ["method.lr=0.0001,0.01,1.0e+30"], tmp_path / "out"
    first = step.tune(file, over, trials=3, out=out, seed=1)
    assert [one["values"]["method.lr"] for one in first["trials"]] == [0.01, 0.0001, 1e30]
    assert first["trials"][2]["state"] == "failed"
    assert "loss" in first["trials"][2]["reason"]
    assert first["best"] == 0
    losses = [one["loss"] for one in first["trials"][:2]]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] < losses[1]
    best = recipe.load(out / "best.yaml")
    assert isinstance(best.method, Full)
    assert best.method.lr == 0.01
    assert best.model.base == str(tmp_path / "base")
    study = optuna.load_study(study_name=None, storage=first["study"])
    assert study.best_params == {"method.lr": 0.01}
    left = out / "trials" / "7" / "run"
    left.mkdir(parents=True)
    again = step.tune(file, over, trials=3, out=out)
    assert not left.exists()  # what a killed worker left
    assert again["trials"] == first["trials"]
    assert "going on after 3 trials" in capsys.readouterr().out
    assert json.loads((out / "tune.json").read_text()) == again
    page = (out / "index.html").read_text()
    assert "Loss by method.lr" in page
    assert "Losses while they trained" in page
    assert first["winner"] in page


def test_resumed_search_counts_the_seconds_of_its_trials_in_the_time_left(tmp_path: Path) -> None:
    study = Study.open(tmp_path / "study.db", {"x": 1}, {"method.lr": Range(1e-5, 1e-2, log=True)})
    for loss in (1.0, 2.0):
        study.ask().tell(loss)
    counted: list[tuple[float, ...]] = []
    step.News(study, 2, lambda *amounts: counted.append(amounts))
    seconds = sum(tried.seconds for tried in study.ended)
    assert counted == [(2, seconds / 2)], "two workers share them"
    assert seconds > 0
