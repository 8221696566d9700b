"""What is known before an arm trains: the rows, the metric that decides, which arms can be, and what they take."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from llmtune.advising.facts import answers_of, kind_of
from llmtune.advising.methods import MethodPrediction, predict_methods
from llmtune.arms.arm import ARMS, Arm
from llmtune.comparing.arms import USUAL
from llmtune.comparing.budget import MOST_ROWS
from llmtune.comparing.folder import SETTINGS, Head
from llmtune.data.gate import Gate
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.held_out.choice import CHRF, EXACT_MATCH, ROUGE, AnswerFacts, choose
from llmtune.launch.command import read_config
from llmtune.machine.cores import count_cores
from llmtune.machine.gpus import count_gpus
from llmtune.machine.memory import machine_memory
from llmtune.model.layout import Layout
from llmtune.recipe.compare import difference
from llmtune.recipe.sections import Recipe, values
from llmtune.recipe.standing import standing
from llmtune.run import locates_mistakes
from llmtune.training.prepare import Examination, examine

_LOAD_BASE, _LOAD_PARAMETER = 1.0, 1.5e-8
"""Seconds of a training before its first step: of any base, and of each of its parameters."""
_ASK_ROW, _ASK_PARAMETER = 0.02, 4e-10
"""Seconds of a held-out row in an evaluation, likewise."""
_GENERAL_ROWS = 80
"""Held-out rows that the general questions and texts take as long as."""
_SHOTS_COST = 2
"""How many held-out rows one with worked examples before it takes as long as."""
_STEP_OPERATIONS = 1e11
"""Operations a second that a step is taken to reach where nothing better is known."""


@locates_mistakes
def check_rows(settings: Recipe) -> None:
    """Raise FieldError where a recipe has no held-out rows to compare on, or no validation rows to search with."""
    data = settings.data
    if not data.eval and not data.eval_fraction:
        if not data.test:
            raise FieldError("data.eval_fraction", "no row is held out to compare on; set data.test, or 0.1 here")
        raise FieldError("data.eval_fraction", "no validation row is there to choose rates by; set data.eval, or 0.05")
    if not isinstance(data.train, str) and not (data.eval or data.test):
        message = "a mixture holds out other rows with each seed; set data.test, the rows to compare on"
        raise FieldError("data.test", message)


@locates_mistakes
def survey(settings: Recipe, arms: Sequence[Arm]) -> Head:
    """Check a recipe and its rows, and predict each arm; raises RecipeError where nothing can be compared."""
    recipe = Recipe.load(Path(str(settings.file)), [*settings.overrides, *SETTINGS])
    examination = examine(recipe, count_gpus())
    data = examination.data
    if not len(data.test):
        raise FieldError("data.eval_fraction", "no row is held out to compare on; set data.test")
    if not len(data.eval):
        raise FieldError("data.eval_fraction", "no validation row is there to choose rates by; set data.eval")
    metric, kind = decides(recipe, data)
    predictions = predict_methods(recipe, arms)
    return {
        "files": {part: file.get("sha256") for part, file in data.findings["files"].items()},
        "recipe": values(standing(settings)),
        "base": _base(examination),
        "metric": metric,
        "higher_is_better": metric != "loss",
        "held_out": {"n": min(len(data.test), recipe.eval.limit or len(data.test)), "source": _held_out(recipe)},
        "train": {"rows": len(data.train), "tokens": examination.lengths.tokens, "kind": kind},
        "machine": machine(),
        "costs": costs(recipe, examination, predictions),
        "validation_rows": MOST_ROWS,
        "predicted": {one.arm: {"bytes": one.bytes, "seconds": one.seconds} for one in predictions},
        "skipped": {one.arm: one.reason for one in predictions if not one.fits},
    }


def decides(recipe: Recipe, data: Gate) -> tuple[str, str]:
    """The metric that decides on the held-out rows, and the kind of the training rows: labels, json or text."""
    facts = AnswerFacts()
    for row in islice(data.test, recipe.eval.limit):
        if row.messages:
            facts.add_row(row)
    train = data.rows["train"]
    metrics, _ = choose(recipe.eval.metrics, facts, train)
    if not facts.rows:
        return "loss", "text"
    kind = kind_of(answers_of(train))
    asked = ("rougeL",) if ROUGE in metrics else (CHRF,) if CHRF in metrics else ()
    return (EXACT_MATCH if kind != "text" or not asked else asked[0]), kind


def _base(examination: Examination) -> dict[str, Any]:
    base = examination.table.base
    return {
        "name": base.name,
        "revision": base.revision,
        "hub_id": base.hub_id,
        **asdict(examination.layout.facts),
    }


def _held_out(recipe: Recipe) -> str:
    data = recipe.data
    return ", ".join(one.source for one in data.held_out) + (" (set aside)" if data.held_out_part == "train" else "")


def machine() -> dict[str, Any]:
    """What arms run on, in words that name no one."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": count_cores(),
        "gpus": count_gpus(),
        "memory": machine_memory(),
    }


def costs(recipe: Recipe, examination: Examination, predictions: Sequence[MethodPrediction]) -> dict[str, float]:
    """Seconds of a training's start, of an evaluation, of the base's answers and of a step, roughly."""
    layout: Layout = examination.layout
    parameters = layout.facts.parameters
    rows = len(examination.data.test) if recipe.eval.limit is None else recipe.eval.limit
    asked = rows + (_GENERAL_ROWS if recipe.eval.forgetting else 0)
    load = _LOAD_BASE * min(1.0, parameters / 1e7) + _LOAD_PARAMETER * parameters
    per_step = examination.lengths.tokens / examination.lengths.rows * recipe.train.batch_size
    steps = max(1, examination.table.steps)
    known = [one.seconds / steps for one in predictions if one.seconds]
    step = max(known) if known else 6 * parameters * per_step / _STEP_OPERATIONS
    ask = _ASK_ROW * min(1.0, parameters / 1e7) + _ASK_PARAMETER * parameters
    shots = _SHOTS_COST * rows if recipe.eval.shots else 0
    return {"load": load, "evaluation": load + asked * ask, "base": (asked + shots) * ask, "step": step}


def usual_arms(recipe: Recipe) -> tuple[Arm, ...]:
    """The arms of a comparison that names none: qlora in place of lora where only that fits."""

    def fits(name: str) -> bool:
        return predict_methods(recipe, [ARMS[name]])[0].fits

    instead = {"lora": "qlora"} if not fits("lora") and fits("qlora") else {}
    return tuple(ARMS[instead.get(name, name)] for name in USUAL)


def check_arms(settings: Recipe, arms: Sequence[Arm]) -> None:
    """Raise RecipeError for an arm that shards its base, and for two arms that are the same recipe."""
    known: list[tuple[Arm, Recipe]] = []
    for arm in arms:
        try:
            recipe = Recipe.load(Path(str(settings.file)), [*settings.overrides, *SETTINGS, *arm.set])
        except RecipeError:
            continue  # a row of its own says why it cannot be
        _refuse_sharded(recipe)
        same = next((other for other, one in known if not difference(one, recipe)), None)
        if same is not None:
            raise RecipeError(f"--arms: {same.name} and {arm.name} are the same recipe; leave one of them out")
        known.append((arm, recipe))


@locates_mistakes
def _refuse_sharded(recipe: Recipe) -> None:
    name = recipe.launch.accelerate
    if name != "auto" and read_config(name).get("distributed_type") == "FSDP":
        message = f"{name} shards a base over processes, and each arm trains in one"
        raise FieldError("launch.accelerate", f"{message}; try --set launch.accelerate=auto")
