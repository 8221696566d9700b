"""The seconds that a run's training will take, said before its first step and set beside what it took."""

from contextlib import suppress

import torch

from llmtune.errors import LlmtuneError
from llmtune.estimate.fit import Question, card_seconds
from llmtune.estimate.memory import forecast
from llmtune.estimate.passes import PassSize, setting_of
from llmtune.model.layout import Layout
from llmtune.numbers import duration
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.run_log import Record
from llmtune.timing.rate import card_rate, cpu_rate
from llmtune.timing.seconds import Work, cpu_seconds


def run_seconds(
    run: Run,
    recipe: Recipe,
    layout: Layout,
    work: Work,
    device: torch.device,
    world: int,
    tokens: int,
    checkpointing: bool,
) -> float | None:
    """Seconds of a run's training in so many processes, in passes of up to so many tokens.

    None where it is not known: a card that is not in the table, processes that share a CPU, a run without a plan.
    """
    table = _plan_of(run)
    if table is None:
        return None
    setting = setting_of(recipe, world, device.type)
    memory = forecast(layout, setting, work.lengths.longest)
    if device.type == "cpu":
        known = cpu_rate(layout, setting.dtype, fresh=False) if world == 1 else None
        return known and cpu_seconds(recipe, layout, table, memory, work, checkpointing, known)
    rate = card_rate(device)
    return rate and card_seconds(
        layout, memory, question_of(recipe, table, work), PassSize(tokens, checkpointing, ""), rate, world
    )


def question_of(recipe: Recipe, table: PlanTable, work: Work) -> Question:
    """The rows and steps for which a device is to be judged."""
    per_step = recipe.train.batch_size * work.lengths.tokens / work.lengths.rows
    return Question(work.lengths, [stage.end - stage.start for stage in table.stages], per_step)


def time_record(step: int, predicted: float, measured: float) -> Record:
    """What a training that has ended was predicted to take, and took."""
    words = f"time: predicted about {duration(predicted)}, measured {duration(measured)}"
    return {
        "step": step,
        "time": words,
        "predicted_seconds": round(predicted, 3),
        "measured_seconds": round(measured, 3),
    }


def _plan_of(run: Run) -> PlanTable | None:
    with suppress(LlmtuneError):
        return PlanTable.read(run.plan_file)
    return None
