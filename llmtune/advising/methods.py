"""What each method takes on a recipe's base and rows: memory and minutes, here or on a card that is named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.advising.here import fit_here
from llmtune.advising.lengths import sampled
from llmtune.arms.arm import Arm
from llmtune.data.gate import check_sources, split_rows
from llmtune.data.store.read import read_part
from llmtune.data.store.rows import StoredRows
from llmtune.errors import LlmtuneError
from llmtune.estimate.cards import Card
from llmtune.estimate.fit import Fit, on_card
from llmtune.machine.gpus import count_gpus
from llmtune.model.layout import Layout
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.run import locates_mistakes
from llmtune.timing.predicted import question_of
from llmtune.timing.seconds import Work
from llmtune.training.bases.base import check_model, locate
from llmtune.training.plan_table import build_layout, plan_table
from llmtune.working import working


@dataclass(frozen=True)
class MethodPrediction:
    """What an arm takes at the recipe's epochs; None where it is not known."""

    arm: str
    bytes: int | None
    """The most memory of one device, training alone."""
    seconds: float | None
    """Of the training, without start-up and evaluation."""
    fits: bool
    reason: str
    """How it fits, or why it does not, in one line."""
    trained: int = 0
    """Parameters that ever train."""


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe, and what a training of them passes through the model."""

    train: StoredRows
    held_out: StoredRows
    work: Work


def predict_methods(recipe: Recipe, arms: Sequence[Arm]) -> list[MethodPrediction]:
    """What each arm of a recipe takes on this machine; an arm that cannot be says why.

    Raises RecipeError for bad rows. Nothing is trained; the base's weights are not loaded.
    """
    return predict_on(recipe, arms, read_rows(recipe), None)


def predict_on(recipe: Recipe, arms: Sequence[Arm], rows: RecipeRows, card: Card | None) -> list[MethodPrediction]:
    """The same for rows that were read, on a card where one is given."""
    with working("predicting memory and time", total=len(arms), unit="methods") as step:
        predictions = []
        for arm in arms:
            predictions.append(_predict(recipe, arm, rows.work, card))
            step()
    return predictions


@locates_mistakes
def read_rows(recipe: Recipe) -> RecipeRows:
    """The rows of a recipe's training and comparison, with lengths by a sample of them."""
    with working("reading the rows"):
        recipe, base = locate(recipe, weights=False)
        check_sources(recipe)
        train, held_out = split_rows(recipe.data, recipe.train.seed)
        if recipe.data.eval:
            validation = len(read_part(recipe.data, "eval"))
        else:
            validation = round(len(train) * recipe.data.eval_fraction / (1 - recipe.data.eval_fraction))
        return RecipeRows(train, held_out, Work(sampled(train, recipe.data, base), validation))


@dataclass(frozen=True)
class _Arm:
    """An arm's recipe, with its plan laid over its base."""

    recipe: Recipe
    layout: Layout
    table: PlanTable
    work: Work

    def on(self, card: Card | None) -> tuple[Fit, float | None]:
        """What it takes on a card, or on this machine, and seconds."""
        if card is None:
            return fit_here(self.recipe, self.layout, self.table, self.work, count_gpus())
        question = question_of(self.recipe, self.table, self.work)
        fit = on_card(self.recipe, self.layout, question, card, self.recipe.launch.processes or 1)
        return fit, fit.seconds


def with_arm(recipe: Recipe, arm: Arm) -> Recipe:
    """The recipe with an arm's overrides; raises RecipeError for those that cannot be."""
    return Recipe.load(Path(str(recipe.file)), [*recipe.overrides, *arm.set]) if arm.set else recipe


def _predict(recipe: Recipe, arm: Arm, work: Work, card: Card | None) -> MethodPrediction:
    try:
        laid = _lay_out(with_arm(recipe, arm), work)
        fit, seconds = laid.on(card)
    except LlmtuneError as error:
        return MethodPrediction(arm.name, None, None, False, str(error))
    most = max(sum(parts.values()) for parts in fit.stages)
    return MethodPrediction(arm.name, most, seconds, fit.fits, fit.reason, laid.table.trained)


@locates_mistakes
def _lay_out(recipe: Recipe, work: Work) -> _Arm:
    recipe, base = locate(recipe, weights=False)
    layout = build_layout(recipe, base, check_model(recipe, base))
    return _Arm(recipe, layout, plan_table(recipe, base, layout, work.lengths.rows, 1), work)
