"""Keeps the best checkpoint by validation, and ends a training that gets no better."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.adapters.delta import Trained
from llmtune.errors import FieldError, TrainingError
from llmtune.recipe.sections import Recipe
from llmtune.run_log import Record
from llmtune.training.checkpoint import TENSORS, checkpoint_folder

LOSS, SCORE = "loss", "score"
SHARDED = "score needs the whole model in each process, and fsdp2 shards it; try loss"
_WORDS = {LOSS: "validation loss", SCORE: "exact match on validation rows"}


@dataclass(frozen=True)
class Choice:
    """The checkpoint that became the delta, and why."""

    by: str
    """loss or score."""
    step: int
    value: float
    last_step: int
    """The step after which training ended."""
    last_value: float | None
    """Its validation; None where an earlier process computed it."""

    @property
    def in_words(self) -> str:
        """best: step 40, validation loss 0.612; step 60 has 0.655."""
        chosen = f"step {self.step:,}, {_WORDS[self.by]} {self.value:.4g}"
        if self.step == self.last_step:
            return f"best: the last step, {chosen}"
        last = "ended the training" if self.last_value is None else f"the last one, has {self.last_value:.4g}"
        return f"best: {chosen}, is the result; step {self.last_step:,}{' ' if self.last_value is None else ', '}{last}"

    def to_json(self) -> dict[str, object]:
        """The choice as the manifest holds it."""
        return {**asdict(self), "in_words": self.in_words}


class BestCheckpoint(TrainerCallback):
    """Notes the best validation in Trainer's state, which every checkpoint holds, and ends a last stage without one.

    Patience counts the validations of the last stage alone: a staged plan is never ended before all of it trained.
    """

    def __init__(self, by: str, patience: int | None, last_stage: int) -> None:
        """`last_stage` is the step after which the plan's last stage begins."""
        self.by, self.patience, self._last_stage = by, patience, last_stage
        self._latest: tuple[int, float] | None = None
        self._waited = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        """Count again what a resumed run had waited before it was stopped."""
        since = max(state.best_global_step or 0, self._last_stage)
        every = max(1, int(state.eval_steps or 1))
        self._waited = max(0, state.global_step // every - since // every)
        control.should_training_stop = self._is_over()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **named: object,
    ) -> None:
        """Compare a validation with the best one."""
        value, step = metrics[f"eval_{self.by}"], state.global_step
        self._latest = (step, value)
        best = state.best_metric
        if math.isfinite(value) and (best is None or (value < best if self.by == LOSS else value > best)):
            state.best_metric, state.best_global_step, self._waited = value, step, 0
        elif step > self._last_stage:
            self._waited += 1
        if self._is_over():
            control.should_training_stop = control.should_save = True

    def _is_over(self) -> bool:
        return self.patience is not None and self._waited >= self.patience

    def choose(self, state: TrainerState, record: Callable[[Record], None]) -> Choice | None:
        """Choose and record the best checkpoint; None where no validation gave a number."""
        if state.best_metric is None or not state.best_global_step:
            return None
        last_value = self._latest[1] if self._latest and self._latest[0] == state.global_step else None
        choice = Choice(self.by, state.best_global_step, state.best_metric, state.global_step, last_value)
        record({"step": state.global_step, "best": choice.in_words})
        return choice


def best_checkpoint(recipe: Recipe, last_stage: int) -> BestCheckpoint | None:
    """What keeps the best checkpoint of a recipe's training; None where the last one is kept."""
    by = measure_of(recipe)
    return BestCheckpoint(by, recipe.train.patience, last_stage) if by else None


def measure_of(recipe: Recipe) -> str | None:
    """By what the best checkpoint is chosen: loss or score; None where the last one is kept."""
    keep = recipe.train.keep_best
    return (LOSS if keep is True else keep) or None


def check_selection(recipe: Recipe) -> list[str]:
    """Notes on how the best checkpoint is chosen; raises FieldError where there is nothing to choose it by."""
    train, by = recipe.train, measure_of(recipe)
    if by is None:
        if train.patience is not None:
            raise FieldError("train.patience", "waits for a better checkpoint to keep; set train.keep_best: true")
        return []
    if not recipe.data.eval and not recipe.data.eval_fraction:
        raise FieldError("train.keep_best", "needs validation rows; set data.eval, or data.eval_fraction: 0.05")
    if by == SCORE and recipe.memory.frozen_blocks == "stream":
        raise FieldError("train.keep_best", "score needs the whole model, and stream keeps blocks on disk; try loss")
    if by == SCORE and recipe.launch.accelerate == "fsdp2":
        raise FieldError("train.keep_best", SHARDED)
    told = "the results are told on the rows that the best checkpoint is chosen by; data.test keeps them apart"
    return [] if recipe.data.test else [told]


def tensors_of(checkpoints: Path, choice: Choice | None, last: Trained) -> Trained:
    """The file with the trained tensors of the chosen checkpoint, or the `last` ones; raises TrainingError for none."""
    if choice is None or choice.step == choice.last_step:
        return last
    file = checkpoint_folder(checkpoints, choice.step) / TENSORS
    if not file.is_file():
        raise TrainingError(f"{file.parent}: the best checkpoint is gone, so it cannot be the result")
    return file
