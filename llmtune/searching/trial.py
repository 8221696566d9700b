"""A training for its validations alone: it reports each one's loss, may be ended early, and leaves nothing on disk."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtune.arms.record import Point
from llmtune.data.example import Example
from llmtune.errors import RecipeError
from llmtune.files import digest_of
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.sections import Recipe
from llmtune.searching.study import VALIDATIONS
from llmtune.searching.watch import Report, Watch, train_watched
from llmtune.training.prepare import Prepared, prepare_all


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    pruned: bool
    steps: int
    total: int
    """Steps of the whole training."""
    curve: tuple[Point, ...]
    keeps_best: bool
    """Whether the recipe's result is its best checkpoint, and not its last."""
    validation: str
    """Names the validation rows, as tokens."""

    @property
    def seconds(self) -> float:
        """From the first step to the last validation."""
        return self.curve[-1]["seconds"] if self.curve else 0.0

    @property
    def loss(self) -> float:
        """The validation loss of what the recipe's training would leave; NaN without a validation."""
        losses = [point["loss"] for point in self.curve] or [float("nan")]
        return min(losses) if self.keeps_best else losses[-1]


def train_trial(
    recipe: Recipe,
    folder: Path,
    report: Report,
    stops: Callable[[], bool] = lambda: False,
    validation: str | None = None,
) -> Outcome:
    """Train a recipe in a folder that is removed at the end, in this process; gives what it came to.

    `stops` tells between validations, too, whether the training should end. `validation` names the rows that the losses
    are measured on: raises RecipeError for others before anything trains, and what training raises.
    """
    shutil.rmtree(folder, ignore_errors=True)
    watch = Watch(report=report, stops=stops)
    try:
        prepared = prepare_all(as_trial(recipe), folder, count_gpus())
        rows = _check_rows(prepared, validation)
        train_watched(prepared, watch, keeps=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(watch.ended_early, watch.steps, watch.total, tuple(watch.curve), bool(recipe.train.keep_best), rows)


def as_trial(recipe: Recipe) -> Recipe:
    """The recipe as a trial trains it: on one device, with its validations, and told to no tracker.

    Where validations without improvement end the training, they are as many as the recipe has.
    """
    train_section = recipe.train.model_copy(
        update={
            "save_every": recipe.train.save_every if recipe.train.patience else 1 / VALIDATIONS,
            "keep_best": "loss" if recipe.train.keep_best else False,
        }
    )
    launch = recipe.launch.model_copy(update={"processes": 1})
    evaluation = recipe.eval.model_copy(update={"suite": "none"})
    merge = recipe.merge.model_copy(update={"enabled": False})
    update = {"train": train_section, "launch": launch, "eval": evaluation, "merge": merge}
    return recipe.model_copy(update={**update, "publish": None, "track": ()})


def _check_rows(prepared: Prepared, expected: str | None) -> str:
    """Name the validation rows of a run by their tokens; raises RecipeError for none, or where others are expected."""
    if not prepared.data.eval:
        raise RecipeError("no validation row is left by which trials are compared; raise data.eval_fraction")
    rows = digest_of([_tokens(example) for example in prepared.data.eval])
    if expected not in (None, rows):
        raise RecipeError("its validation rows, as tokens, are not those of the first trial, so losses do not compare")
    return rows


def _tokens(example: Example) -> list[list[int]]:
    return [list(map(int, example.input_ids)), list(map(int, example.labels))]
