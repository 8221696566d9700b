"""A trial measures what its recipe's training would leave, may end early, and leaves nothing."""

import signal
from pathlib import Path

import pytest

from llmtune import recipe
from llmtune.arms.record import Point
from llmtune.errors import RecipeError
from llmtune.run_log import read_log
from llmtune.searching.trial import train_trial
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of twelve steps."""
    folder = tmp_path_factory.mktemp("trial")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(30))
    settings = {"epochs": 2, "batch_size": 4, "save_every": 0.5}
    return tiny.write_recipe(folder / "recipe.json", tiny.save_base(folder / "base"), rows, train=settings)


def test_measures_what_the_training_would_leave_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    before, told = signal.getsignal(signal.SIGINT), list[tuple[int, Point]]()

    def watch(number: int, point: Point) -> bool:
        told.append((number, point))
        return False

    outcome = train_trial(recipe.load(file), tmp_path / "trial", watch)
    assert signal.getsignal(signal.SIGINT) is before
    run = prepare(recipe.load(file), tmp_path / "run", 0)
    train(run)
    losses = {record["step"]: record["eval_loss"] for record in read_log(run.log_file) if "eval_loss" in record}
    measured = {point["step"]: point["loss"] for point in outcome.curve}
    assert set(losses) < set(measured)
    assert {step: measured[step] for step in losses} == losses
    assert outcome.loss == losses[outcome.total]
    assert outcome.steps == outcome.total
    assert not outcome.pruned
    assert told == list(enumerate(outcome.curve, 1))
    assert not (tmp_path / "trial").exists()


def test_ends_early_and_refuses_other_validation_rows(file: Path, tmp_path: Path) -> None:
    outcome = train_trial(recipe.load(file), tmp_path / "trial", lambda number, _: number == 2)
    assert outcome.pruned
    assert len(outcome.curve) == 2
    assert outcome.steps == outcome.curve[-1]["step"] < outcome.total
    other = recipe.load(file, ["data.eval_fraction=0.4"])
    with pytest.raises(RecipeError, match="validation rows, as tokens, are not those of the first trial"):
        train_trial(other, tmp_path / "trial", lambda *_: False, validation=outcome.validation)
