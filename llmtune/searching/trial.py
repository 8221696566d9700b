"""A training for its validations alone: it reports each one's loss, may be ended early, and leaves nothing on disk."""

import gc
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.arms.record import Point
from llmtune.data.example import Example
from llmtune.errors import RecipeError
from llmtune.files import digest_of
from llmtune.machine.device import release_cached, run_device
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.sections import Recipe
from llmtune.searching.study import VALIDATIONS
from llmtune.training.loop import train
from llmtune.training.prepare import Prepared, prepare_all

LOOK = 1.0
"""Seconds between two looks whether a training should end, while it is between validations."""

Report = Callable[[int, Point], bool]
"""Takes the number of a validation, from 1, and the validation; gives whether the training should end now."""


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    pruned: bool
    steps: int
    total: int
    """Steps of the whole training."""
    seconds: float
    """Since the first step, validations included."""
    curve: tuple[Point, ...]
    keeps_best: bool
    """Whether the recipe's result is its best checkpoint, and not its last."""
    validation: str
    """Names the validation rows, as tokens."""

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
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        prepared = prepare_all(as_trial(recipe), folder, count_gpus())
        rows = _check_rows(prepared, validation)
        watch = Validations(report, stops)
        train(prepared.run, prepared, [watch], keeps=False)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
        release_cached(run_device())
    keeps_best = bool(recipe.train.keep_best)
    return Outcome(watch.pruned, watch.steps, watch.total, watch.seconds, tuple(watch.curve), keeps_best, rows)


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


class Validations(TrainerCallback):
    """Keeps and reports each validation, has the last step validated too, and writes no checkpoint.

    Ctrl-C ends at once what it watches: there is no checkpoint to wait for.
    """

    def __init__(self, report: Report, stops: Callable[[], bool] = lambda: False) -> None:
        self._report, self._stops = report, stops
        self._began = self._looked = time.monotonic()
        self.curve: list[Point] = []
        self.pruned, self.steps, self.total, self.seconds = False, 0, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        self._began = time.monotonic()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        self.steps, self.total = state.global_step, state.max_steps
        control.should_evaluate = control.should_evaluate or state.global_step >= state.max_steps
        control.should_save = False
        if not control.should_evaluate and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self.pruned = control.should_training_stop = self._stops()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **named: object,
    ) -> None:
        seconds = time.monotonic() - self._began
        point = Point(step=state.global_step, seconds=round(seconds, 3), loss=metrics["eval_loss"])
        self.curve.append(point)
        self.seconds = seconds
        control.should_save = False
        is_over = control.should_training_stop or state.global_step >= state.max_steps
        if self._report(len(self.curve), point) and not is_over:
            self.pruned = control.should_training_stop = True


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
