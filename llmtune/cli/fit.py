"""What `llmtune plan` and `check` say of memory and time: on this machine, or on a card that is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmtune.estimate.cards import find_card
from llmtune.numbers import duration, size
from llmtune.recipe.sections import Recipe

if TYPE_CHECKING:
    from llmtune.estimate.fit import Fit
    from llmtune.estimate.lengths import Lengths
    from llmtune.model.layout import Layout
    from llmtune.plan.table import PlanTable


@dataclass(frozen=True)
class Prediction:
    """What a recipe takes, and the overrides of the nearest recipe that fits where it does not."""

    fit: "Fit"
    lengths: "Lengths"
    instead: list[str]
    then: "Fit | None"
    sought: bool = False
    """Whether a recipe that fits was sought."""
    cpu_seconds: float | None = None
    """Of the training, where it runs on CPUs."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        instead = None if self.then is None else {"set": self.instead, **self.then.to_json()}
        rows = {"longest": self.lengths.longest, "tokens": self.lengths.tokens, "counted": self.lengths.counted}
        seconds = {} if self.cpu_seconds is None else {"seconds": round(self.cpu_seconds, 3)}
        return {**self.fit.to_json(), **seconds, "rows": rows, "instead": instead}


class Planned(Protocol):
    """A recipe's plan laid over its base, and the lengths of its rows."""

    @property
    def table(self) -> "PlanTable":
        """The plan table."""

    @property
    def layout(self) -> "Layout":
        """The plan over the model."""

    @property
    def lengths(self) -> "Lengths":
        """The training rows."""


def check_card(gpu: str | None) -> None:
    """Raise RecipeError for a word that names no card."""
    if gpu is not None:
        find_card(gpu)


def predict(recipe: Recipe, planned: Planned, gpu: str | None) -> Prediction:
    """What a recipe takes on this machine, or on a card by name; raises RecipeError for an unknown card."""
    from llmtune.advising.here import fit_here
    from llmtune.estimate.fit import nearest_fit, on_card
    from llmtune.machine.gpus import count_gpus
    from llmtune.timing.predicted import question_of
    from llmtune.timing.seconds import Work
    from llmtune.training.prepare import layout_of

    table, layout, lengths = planned.table, planned.layout, planned.lengths
    work = Work(lengths, 0)
    if gpu is None:
        fit, seconds = fit_here(recipe, layout, table, work, count_gpus())
        return Prediction(fit, lengths, [], None, cpu_seconds=seconds if fit.seconds is None else None)
    question, card, cards = question_of(recipe, table, work), find_card(gpu), recipe.launch.processes or 1
    fit = on_card(recipe, layout, question, card, cards)
    if fit.fits:
        return Prediction(fit, lengths, [], None)

    def changed(overrides: list[str]) -> tuple[Recipe, "Layout"]:
        other = Recipe.load(Path(str(recipe.file)), [*recipe.overrides, *overrides])
        return other, layout_of(other)

    instead, then = nearest_fit(recipe, changed, question, card, cards) or ([], None)
    return Prediction(fit, lengths, instead, then, sought=True)


def lines(prediction: Prediction) -> list[str]:
    """The prediction for people."""
    fit = prediction.fit
    cards = f"{fit.cards} x " if fit.cards > 1 else ""
    free = f"{size(fit.free)} free"
    shown = [f"memory on {cards}{fit.card}, {free}"]
    many = len(fit.stages) > 1
    for number, parts in enumerate(fit.stages, 1):
        listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
        shown.append(f"train{f', stage {number}' if many else ''}  {size(sum(parts.values()))}: {listed}")
    if fit.evaluation:
        least = f", {size(fit.evaluation.least)} at the least" if fit.evaluation.least < fit.evaluation.need else ""
        shown.append(f"evaluation  {size(fit.evaluation.need)}{least}")
    if fit.merge:
        shown.append(f"merge  {size(fit.merge.need)} of main memory")
    on_cpu = "" if prediction.cpu_seconds is None else f"; trains for about {duration(prediction.cpu_seconds)}"
    shown.append(_verdict(fit) + (f"{on_cpu}, at the rate of this machine's matrix products" if on_cpu else ""))
    if prediction.then is not None:
        words = " ".join(f"--set {override}" for override in prediction.instead)
        shown.append(f"the nearest recipe that fits: {words}")
        shown.append(_verdict(prediction.then))
    elif prediction.sought:
        shown.append("no change of the recipe that llmtune tries makes it fit; a smaller base would")
    if fit.rough:
        shown.append("activations are judged by the shapes of matrices: this model does not run without its weights")
    shown.append(prediction.lengths.words)
    return shown


def _verdict(fit: "Fit") -> str:
    return f"it fits: {fit.reason}{_time(fit)}" if fit.fits else f"it does not fit: {fit.reason}"


def _time(fit: "Fit") -> str:
    from llmtune.estimate.fit import BLOCK_SECONDS, SHARE_OF_RATE

    if not fit.seconds:
        return ""
    least = f"and {1000 * BLOCK_SECONDS:.0f} ms a block and pass at the least"
    rate = f"at {SHARE_OF_RATE:.0%} of the rate that its maker states"
    return f"; trains for about {duration(fit.seconds)}, {rate}, {least}"
