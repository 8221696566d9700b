"""How long a training takes on CPUs: the operations of its plan at the rate of this machine's matrix products."""

import math
from dataclasses import dataclass

from llmtune.data.batches.passes import DEFAULT_ROWS
from llmtune.estimate.lengths import Lengths
from llmtune.estimate.memory import Forecast, Setting, forecast
from llmtune.frozen.boundary import Span, choose_boundaries
from llmtune.model.layout import Layout
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.timing.rate import cpu_rate

SHARE = 0.6
"""Of the rate of large products, what a training's products reach with all that is computed around them."""
ADAPTER_SHARE = 0.45
"""The same where an adapter's thin products come between: docs/performance.md says how both were measured."""
UPDATE_SECONDS = 4e-9
"""What an optimizer step takes for each number that trains: gradients and states pass through memory."""
UNPACK_SECONDS = 0.9e-9
"""What a pass takes, forward and again backward, to unpack each number of a quantized layer."""


@dataclass(frozen=True)
class Work:
    """The lengths of a training's rows, and how many validation rows pass through the model beside them."""

    lengths: Lengths
    validation: int


def seconds_here(
    recipe: Recipe, layout: Layout, table: PlanTable, setting: Setting, work: Work, checkpointing: bool
) -> float:
    """Seconds of a training on this machine's CPUs, whose rate is measured where it is not known."""
    rate = cpu_rate(layout, setting.dtype)
    return cpu_seconds(
        recipe, layout, table, forecast(layout, setting, work.lengths.longest), work, checkpointing, rate
    )


def cpu_seconds(
    recipe: Recipe, layout: Layout, table: PlanTable, memory: Forecast, work: Work, checkpointing: bool, rate: float
) -> float:
    """Seconds of a training on a CPU whose products reach `rate` operations a second; cached outputs are counted."""
    lengths, train = work.lengths, recipe.train
    tokens, every = lengths.tokens / lengths.rows, math.ceil(train.save_every * table.steps)
    head = _head_operations(layout)
    trains_head = _trains_head(layout)
    spans, steps = [], []
    for stage, boundary in zip(table.stages, layout.boundaries, strict=True):
        steps.append(stage.end - stage.start)
        checks = (stage.end // every - stage.start // every) * work.validation
        spans.append(Span(boundary, steps[-1] * train.batch_size + checks))
    cached = _cached(recipe, table, spans, work, tokens)
    operations, updates = 0.0, 0.0
    for stage, kept, span, count in zip(table.stages, memory.stages, spans, steps, strict=True):
        forward, backward = (kept.trace.products.forward, kept.trace.products.backward)
        below = max((one for one in cached if one <= span.boundary), default=0)
        forward = forward * (1 - below / layout.facts.blocks) / kept.trace.tokens
        backward = backward / kept.trace.tokens + (forward if checkpointing else 0.0)
        rows, checks = count * train.batch_size, span.passes - count * train.batch_size
        operations += tokens * (span.passes * forward + rows * backward)
        operations += tokens * lengths.supervised * head * (rows * (2 + trains_head) + checks)
        updates += count * stage.trained
    if cached:
        first = memory.stages[0].trace
        every_row = lengths.rows + work.validation
        operations += every_row * tokens * first.products.forward / first.tokens * max(cached) / layout.facts.blocks
    passes = sum(steps) * math.ceil(train.batch_size / (train.micro_batch_size or DEFAULT_ROWS))
    unpacked = 2 * passes * sum(layout.skeleton.get_parameter(f"{name}.weight").numel() for name in layout.linear[0])
    share = SHARE if recipe.method.adapter.trains_base else ADAPTER_SHARE
    return operations / (share * rate) + updates * UPDATE_SECONDS + unpacked * UNPACK_SECONDS


def _cached(recipe: Recipe, table: PlanTable, spans: list[Span], work: Work, tokens: float) -> list[int]:
    """The boundaries whose outputs a training keeps, as it decides itself."""
    if not table.frozen_blocks.boundaries:
        return []
    rows = work.lengths.rows + work.validation
    size = round(rows * tokens * table.frozen_blocks.bytes_per_token / len(table.frozen_blocks.boundaries))
    always = recipe.memory.frozen_blocks in ("cache", "stream")
    return choose_boundaries(spans, set(), rows, size, recipe.memory.cache_limit, always)


def _head_operations(layout: Layout) -> float:
    """Operations of the head for a token that is learned, forward alone."""
    return float(2 * layout.skeleton.get_output_embeddings().weight.numel())


def _trains_head(layout: Layout) -> bool:
    shape = layout.skeleton.get_output_embeddings().weight.shape
    return any(one.shape == shape for one in layout.trained.values())
