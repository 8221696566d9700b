"""Whether a recipe fits a device, and the nearest recipe that does."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmtune.errors import FieldError, LlmtuneError
from llmtune.estimate.cards import Card
from llmtune.estimate.lengths import Lengths
from llmtune.estimate.memory import (
    Forecast,
    Setting,
    StageMemory,
    StepMemory,
    evaluation_memory,
    forecast,
    merge_memory,
)
from llmtune.estimate.passes import PassSize, fit_pass, setting_of, settings_for, without_copies
from llmtune.model.layout import Layout
from llmtune.numbers import size as number_of_bytes
from llmtune.recipe.sections import Recipe

MOST_CARDS = 8
SHARE_OF_RATE = 0.4
"""The share of a card's rate that training is taken to reach; docs/performance.md says what was measured."""
BLOCK_SECONDS = 0.003
"""The least that a block takes in one pass, forward and backward: the time in which a CPU launches its kernels."""


@dataclass(frozen=True)
class Fit:
    """What a recipe takes on a device: training by stage, evaluation, merge; and the time, where the rate is known."""

    card: str
    free: int
    cards: int
    size: PassSize | None
    """None where training does not fit."""
    missing: str
    """Why it does not."""
    stages: list[dict[str, int]]
    """Bytes by part."""
    evaluation: StepMemory | None
    merge: StepMemory | None
    seconds: float | None
    rough: bool
    """Whether activations follow from shapes alone, since the model does not run without its weights."""

    @property
    def fits(self) -> bool:
        """Whether training and evaluation fit; the merge is main memory's matter."""
        return self.size is not None and (self.evaluation is None or self.evaluation.least <= self.free)

    @property
    def reason(self) -> str:
        """How it fits, or why it does not, in one line."""
        if self.size is None:
            return self.missing
        if not self.fits and self.evaluation:
            return f"training fits, the evaluation needs {number_of_bytes(self.evaluation.least)} at the least"
        return self.size.reason

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes and seconds."""
        size = self.size
        return {
            "card": self.card,
            "free": self.free,
            "cards": self.cards,
            "fits": self.fits,
            "pass": size and {"tokens": size.tokens, "checkpointing": size.checkpointing, "words": size.reason},
            "missing": self.missing or None,
            "stages": self.stages,
            "evaluation": self.evaluation and self.evaluation.need,
            "evaluation_least": self.evaluation and self.evaluation.least,
            "merge_main_memory": self.merge and self.merge.need,
            "rough": self.rough,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "share_of_rate": SHARE_OF_RATE if self.seconds else None,
        }


@dataclass(frozen=True)
class Question:
    """A recipe's rows and steps, for which a device is to be judged."""

    lengths: Lengths
    steps: list[int]
    """Optimizer steps of each stage."""
    tokens_per_step: float


def on_card(recipe: Recipe, layout: Layout, question: Question, card: Card, cards: int = 1) -> Fit:
    """What a recipe takes on one of so many cards of a kind."""
    setting = replace(setting_of(recipe, cards, "cuda"), dtype=_dtype(recipe))
    return judge(recipe, layout, question, setting, card.words, card.free, card.rate)


def judge(
    recipe: Recipe,
    layout: Layout,
    question: Question,
    setting: Setting,
    name: str,
    free: int,
    rate: float | None = None,
) -> Fit:
    """What a recipe takes in a setting where `free` bytes are free, and at a rate in operations a second."""
    longest = question.lengths.longest
    memory = forecast(layout, setting, longest)
    size, missing = None, ""
    try:
        size = fit_pass(settings_for(recipe.train, layout), memory, setting, longest, free)
    except FieldError as error:
        missing = error.message
    tokens = min(size.tokens, _most_tokens(recipe, setting, longest)) if size else longest
    checkpointing = size.checkpointing if size else True
    memory = memory if size and size.copies else without_copies(memory)
    return Fit(
        name,
        free,
        setting.world,
        size,
        missing,
        [stage.listed(tokens, checkpointing) for stage in memory.stages],
        evaluation_memory(layout, setting) if recipe.eval.suite != "none" else None,
        merge_memory(layout, getattr(torch, recipe.merge.dtype)) if recipe.merge.enabled else None,
        card_seconds(layout, memory, question, size, rate, setting.world) if rate and size else None,
        any(stage.trace.rough for stage in memory.stages),
    )


def _dtype(recipe: Recipe) -> torch.dtype:
    """A card computes in 16 bits unless the recipe says fp32; bf16 and fp16 are of one size."""
    return torch.float32 if recipe.model.precision == "fp32" else torch.bfloat16


def _most_tokens(recipe: Recipe, setting: Setting, longest: int) -> int:
    return longest * -(-recipe.train.batch_size // setting.world)


def card_seconds(
    layout: Layout, memory: Forecast, question: Question, size: PassSize, rate: float, cards: int
) -> float:
    """Seconds of a training on so many cards, each of which does `rate` operations a second."""
    passes = sum(question.steps) * math.ceil(question.tokens_per_step / cards / size.tokens)
    work = _work(layout, memory, question, size.checkpointing)
    return max(work / (rate * SHARE_OF_RATE * cards), passes * layout.facts.blocks * BLOCK_SECONDS)


def _work(layout: Layout, memory: Forecast, question: Question, checkpointing: bool) -> float:
    """Operations of the matrix products of a training; the head's are those of learned tokens alone."""
    weight = layout.skeleton.get_output_embeddings().weight
    trains = any(parameter.shape == weight.shape for parameter in layout.trained.values())
    head = 2 * weight.numel() * (2 + trains) * question.lengths.supervised
    each = (_operations(stage, checkpointing, head) for stage in memory.stages)
    return sum(steps * question.tokens_per_step * one for steps, one in zip(question.steps, each, strict=True))


def _operations(memory: StageMemory, checkpointing: bool, head: float) -> float:
    """Operations a token: forward, backward where it passes, forward again with checkpointing, and the head's."""
    products = memory.trace.products
    again = products.forward if checkpointing else 0.0
    return (products.forward + products.backward + again) / memory.trace.tokens + head


def changes(recipe: Recipe) -> Iterator[list[str]]:
    """Overrides that lower a recipe's memory, each list more than the one before, without other cards."""
    lighter = []
    if recipe.train.activation_checkpointing is False:
        lighter.append("train.activation_checkpointing=auto")
    if recipe.train.micro_batch_size or recipe.train.micro_batch_tokens:
        lighter += ["train.micro_batch_size=1", "train.micro_batch_tokens=null"]
    if lighter:
        yield lighter
    if recipe.train.optimizer == "adamw" and recipe.method.adapter.trains_base:
        yield [*lighter, "train.optimizer=adamw_8bit"]
    if recipe.method.adapter.trains_base:
        lighter = [*lighter, "method=lora"]
        yield lighter
    if recipe.model.quantize != "4bit":
        yield [*lighter, "model.quantize=4bit"]


def nearest_fit(
    recipe: Recipe,
    changed: Callable[[list[str]], tuple[Recipe, Layout]],
    question: Question,
    card: Card,
    cards: int,
) -> tuple[list[str], Fit] | None:
    """The first overrides under which a recipe fits a card, then on several cards; None where none is enough."""
    for overrides in changes(recipe):
        try:
            fit = on_card(*changed(overrides), question, card, cards)
        except LlmtuneError:  # such as 4 bits for what an adapter takes its start from
            continue
        if fit.fits:
            return overrides, fit
    count = 2 * max(1, cards)
    while count <= MOST_CARDS:
        overrides = ["launch.accelerate=fsdp2", f"launch.processes={count}"]
        try:
            fit = on_card(*changed(overrides), question, card, count)
        except LlmtuneError:
            return None
        if fit.size is not None:
            return overrides, fit
        count *= 2
    return None
