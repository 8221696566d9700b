"""Everything that `llmtune plan --methods` tells of a recipe: predictions, rules, what was measured, one method."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.advising.choice import Choice, choose, points
from llmtune.advising.facts import Facts, answers_of, count_labels, kind_of
from llmtune.advising.limits import Limits
from llmtune.advising.methods import MethodPrediction, RecipeRows, predict_on, read_rows, with_arm
from llmtune.advising.recall import Remembered, like
from llmtune.advising.rules import GENERAL, Rule, applying, load_rules
from llmtune.arms.arm import ARMS, Arm
from llmtune.errors import LlmtuneError
from llmtune.estimate.cards import find_card
from llmtune.launch.devices import launch_device
from llmtune.numbers import duration, size
from llmtune.recipe.sections import Recipe
from llmtune.run import locates_mistakes
from llmtune.training.plan_table import steps_per_epoch, total_steps
from llmtune.training.prepare import layout_of

OWN = "as written"
"""The name of a recipe's own method where no arm has one."""


@dataclass(frozen=True)
class Advice:
    """What is advised on a recipe."""

    facts: Facts
    own: str
    """The arm that is the recipe's own method."""
    methods: list[MethodPrediction]
    beyond: dict[str, str]
    """Methods that do not fit, or are over a limit, and why."""
    rules: list[Rule]
    """Those that hold."""
    before: list[Remembered]
    choice: Choice | None
    command: str
    """What takes the recommended method; where there is none, the nearest change that works."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "facts": asdict(self.facts),
            "methods": [
                {
                    **asdict(one),
                    "own": one.arm == self.own,
                    "beyond": self.beyond.get(one.arm),
                    "points": points(self.rules, one.arm),
                }
                for one in self.methods
            ],
            "rules": [rule.model_dump(exclude={"when", "case"}) for rule in self.rules],
            "before": [asdict(one) for one in self.before],
            "recommended": self.choice and asdict(self.choice),
            "command": self.command,
        }


def advise(recipe: Recipe, gpu: str | None, limits: Limits) -> Advice:
    """Predict every method for a recipe, here or on a card by name, and recommend one within the limits."""
    card = None if gpu is None else find_card(gpu)
    own, arms = own_arm(recipe)
    rows = read_rows(recipe)
    methods = predict_on(recipe, arms, rows, card)
    facts = _facts(recipe, rows, methods, own, limits, "gpu" if card else _device(recipe))
    rules = applying(load_rules(), facts)
    before = like(recipe.model.base, facts.parameters, facts.kind, facts.rows)
    beyond = {one.arm: why for one in methods if (why := _beyond(one, limits))}
    within = [one.arm for one in methods if one.arm not in beyond]
    choice = choose(within, rules, before, {one.arm: one.seconds for one in methods})
    command = _command(recipe, choice, own) if choice else _nearest(methods, limits)
    return Advice(facts, own, methods, beyond, rules, before, choice, command)


def own_arm(recipe: Recipe) -> tuple[str, list[Arm]]:
    """The name of the arm that is a recipe's own method, and all arms, that one with the recipe's own settings."""
    own = OWN
    for arm in ARMS.values():
        try:
            if _same(with_arm(recipe, arm), recipe):
                own = arm.name
        except LlmtuneError:  # such as an adapter over whole tensors that are in 4 bits; its row says so
            continue
    mine = Arm(own, ())
    return own, [mine if arm.name == own else arm for arm in ARMS.values()] + [mine] * (own == OWN)


def _same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes have one method, whatever its settings."""
    return (one.method.words, one.model.quantize) == (other.method.words, other.model.quantize)


def _device(recipe: Recipe) -> str:
    return "cpu" if launch_device(recipe.launch).type == "cpu" else "gpu"


@locates_mistakes
def _facts(
    recipe: Recipe, rows: RecipeRows, methods: Sequence[MethodPrediction], own: str, limits: Limits, device: str
) -> Facts:
    answers = answers_of(rows.train)
    predicted = {one.arm: one for one in methods}
    lora, mine, lengths = predicted["lora"], predicted[own], rows.work.lengths
    layout, adapter = layout_of(recipe), recipe.method.adapter
    rate = max(stage.lr for stage in layout.plan.stages)
    steps = total_steps(recipe.train, lengths.rows, 1)
    usual = None if lora.seconds is None else lora.seconds / 60
    rate_at_32 = adapter.rate_at_32(rate)
    is_lora = rate_at_32 is not None
    return Facts(
        rows=lengths.rows,
        kind=kind_of(answers),
        labels=count_labels(answers),
        held_out=len(rows.held_out),
        parameters=layout.facts.parameters,
        device=device,
        minutes=usual if limits.minutes is None else limits.minutes,
        epochs=steps / steps_per_epoch(recipe.train, lengths.rows, 1),
        steps=steps,
        batch_size=recipe.train.batch_size,
        adapter=adapter.kind,
        all_linear=adapter.takes_all if is_lora else None,
        lora_fits=None if lora.bytes is None else lora.fits,
        lora_rate=rate_at_32,
        load=lengths.tokens * lengths.supervised / mine.trained if is_lora and mine.trained else None,
    )


def _beyond(one: MethodPrediction, limits: Limits) -> str:
    """Why a method is no candidate; empty where it is one."""
    if not one.fits:
        return one.reason or "does not fit"
    if limits.bytes is not None and (one.bytes or 0) > limits.bytes:
        return f"needs {size(one.bytes or 0)}, over --memory {size(limits.bytes)}"
    if limits.minutes is None:
        return ""
    if one.seconds is None:
        return "its time is not known, so --budget cannot tell"
    over = one.seconds > 60 * limits.minutes
    return f"takes {duration(one.seconds)}, over --budget {duration(60 * limits.minutes)}" if over else ""


def _command(recipe: Recipe, choice: Choice, own: str) -> str:
    """The command that trains by the recommended method."""
    changes = () if choice.arm == own else ARMS[choice.arm].set
    overrides = (word for change in (*recipe.overrides, *changes) for word in ("--set", change))
    return shlex.join(["llmtune", "run", str(recipe.file), *overrides])


def _nearest(methods: Sequence[MethodPrediction], limits: Limits) -> str:
    """What would let some method in, in one line."""
    fitting = [one for one in methods if one.fits]
    if not fitting:
        return "no method fits; a smaller base, a shorter data.max_length or --gpu CARD would"
    least = min(fitting, key=lambda one: one.bytes or 0)
    if limits.bytes is not None and (least.bytes or 0) > limits.bytes:
        return f"the smallest is {least.arm}: --memory {(least.bytes or 0) / 1e9:.2f}GB"
    timed = [one for one in fitting if one.seconds and (limits.bytes is None or (one.bytes or 0) <= limits.bytes)]
    if not timed:
        return "no time is known here; leave --budget out"
    quickest = min(timed, key=lambda one: one.seconds or 0)
    minutes = (quickest.seconds or 0) / 60
    epochs = (limits.minutes or minutes) / minutes
    return f"the quickest is {quickest.arm}: --budget {minutes:.1f}m, or {epochs:.0%} of the recipe's epochs"


def spoken_of(rules: Sequence[Rule], arms: Sequence[str]) -> list[Rule]:
    """The general rules, then those about some methods."""
    return [rule for rule in rules if rule.about == GENERAL] + [rule for rule in rules if rule.about in arms]
