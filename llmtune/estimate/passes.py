"""How large one forward and backward pass may be: in tokens, from the memory that is free."""

from dataclasses import dataclass, replace
from math import ceil

import torch

from llmtune.data.batches.passes import DEFAULT_ROWS
from llmtune.errors import FieldError, MachineError
from llmtune.estimate.memory import COPIES, Forecast, Setting, StageMemory, forecast
from llmtune.launch.command import read_config
from llmtune.machine.precision import computing_dtype
from llmtune.model.layout import Layout
from llmtune.model.sharded import is_sharded_run
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe, Train

LARGE, ENOUGH = 16_384, 4_096
"""Tokens of a pass on a GPU: the most that is worth its memory, and what does without checkpointing."""
SHARE = {"cuda": 0.92, "cpu": 1.0}
"""The share of free memory that a run may fill: on GPUs the rest is lost between the pieces of the allocator."""


@dataclass(frozen=True)
class PassSize:
    """The size of a pass, and why it is so."""

    tokens: int
    """The most tokens of one pass on one device, padding included; a longer row is a pass of its own."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    reason: str
    """One line for people: passes of up to 8,192 tokens without checkpointing (12.3 GB of 71.0 GB free)."""
    copies: bool = True
    """Whether 16-bit copies of weights fit beside it; only CPUs do without."""


def choose_pass_size(
    recipe: Recipe, layout: Layout, world: int, longest: int, device: torch.device, free: int
) -> PassSize:
    """The size of a pass for rows of up to `longest` tokens, where `free` bytes may be taken in all.

    `free` counts from before the base is loaded; processes on CPUs share it. Settings of the recipe that name a size or
    checkpointing stand. Raises FieldError, exit code 3, where not one row of `longest` tokens fits.
    """
    setting = setting_of(recipe, world, device.type)
    return fit_pass(settings_for(recipe.train, layout), forecast(layout, setting, longest), setting, longest, free)


def settings_for(train: Train, layout: Layout) -> Train:
    """The settings as they are for a model whose code may not support checkpointing."""
    able = layout.skeleton.supports_gradient_checkpointing or train.activation_checkpointing != "auto"
    return train if able else train.model_copy(update={"activation_checkpointing": False})


def setting_of(recipe: Recipe, world: int, device: str) -> Setting:
    """Where and how a process of the recipe computes, on a type of device."""
    name = recipe.launch.accelerate
    # Where auto shards, its recipe says auto in the processes too.
    sharded = is_sharded_run() or (name != "auto" and read_config(name)["distributed_type"] == "FSDP")
    # The card may be another machine's: its 16 bits, of whatever kind, take the same room.
    half = device == "cuda" and recipe.model.precision != "fp32"
    dtype = torch.bfloat16 if half else computing_dtype(recipe.model.precision, torch.device("cpu"))
    return Setting(
        "cuda" if device == "cuda" else "cpu",
        dtype,
        world,
        sharded,
        recipe.train.optimizer,
        recipe.memory.frozen_blocks == "stream",
    )


def fit_pass(train: Train, memory: Forecast, setting: Setting, longest: int, free: int) -> PassSize:
    """The size of a pass by the recipe's settings, else the largest worthwhile one that `free` bytes are enough for."""
    free = free // setting.world if setting.device == "cpu" else free
    budget, wanted = free * SHARE[setting.device], train.activation_checkpointing
    step = longest * ceil(train.batch_size / setting.world)
    if setting.device == "cpu":
        step = min(step, longest * DEFAULT_ROWS)
    named = _named_tokens(train, longest)
    goal = min(step, named or (LARGE if setting.device == "cuda" else step))
    enough = longest if setting.device == "cpu" else min(goal, max(longest, ENOUGH))
    least = without_copies(memory)
    for checkpointing in (False, True) if wanted == "auto" else (bool(wanted),):
        room = least.room(budget, checkpointing)
        last = checkpointing or wanted != "auto"
        if room >= (goal if named else longest if last else enough):
            return _chosen(memory, named or max(longest, min(goal, room)), goal, checkpointing, free)
    if least.room(free, wanted is not False) >= longest:
        return _chosen(memory, named or longest, goal, wanted is not False, free)
    raise _nothing_fits(train, least, setting, longest, free)


def without_copies(memory: Forecast) -> Forecast:
    """The memory where CPUs cast a weight at each use; the same on a device that keeps its casts anyway."""

    def least(stage: StageMemory) -> StageMemory:
        return replace(stage, parts={**stage.parts, COPIES: stage.parts[COPIES] - stage.optional}, optional=0)

    return Forecast([least(stage) if stage.optional else stage for stage in memory.stages])


def copies_fit(memory: Forecast, tokens: int, checkpointing: bool, free: int) -> bool:
    """Whether `free` bytes hold 16-bit copies of weights beside passes of so many tokens."""
    return memory.peak(tokens, checkpointing) <= free


def _named_tokens(train: Train, longest: int) -> int | None:
    """The tokens of a pass that the recipe names, in rows or in tokens; None where it names neither."""
    limits = [train.micro_batch_tokens, train.micro_batch_size and train.micro_batch_size * longest]
    return min((max(longest, limit) for limit in limits if limit), default=None)


def _chosen(memory: Forecast, tokens: int, goal: int, checkpointing: bool, free: int) -> PassSize:
    copies, least = copies_fit(memory, min(tokens, goal), checkpointing, free), without_copies(memory)
    need = (memory if copies else least).peak(min(tokens, goal), checkpointing)
    how = ("with" if checkpointing else "without") + " activation checkpointing"
    how += "" if copies or least == memory else ", without 16-bit copies of weights"
    of = f"{size(need)} of {size(free)} free"
    words = f"{of}; it may not fit" if need > free else of
    return PassSize(tokens, checkpointing, f"passes of up to {tokens:,} tokens {how} ({words})", copies)


def _nothing_fits(train: Train, memory: Forecast, setting: Setting, longest: int, free: int) -> FieldError:
    """What one row needs, what is free, and the keys that lower it, in order."""
    checkpointing = train.activation_checkpointing is not False
    need = memory.peak(longest, checkpointing)
    keys = [
        "train.activation_checkpointing: auto" if not checkpointing else "",
        "data.max_length",
        "model.quantize: 4bit with an adapter",
        "method.adapter",
        "" if setting.sharded or setting.device == "cpu" else "launch.accelerate: fsdp2 over several GPUs",
    ]
    message = f"one row of {longest:,} tokens needs {size(need)} and {size(free)} are free"
    hint = ", then ".join(key for key in keys if key)
    return FieldError("model.base", f"{message}; what lowers it: {hint}", MachineError)
