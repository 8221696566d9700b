"""A model under a plan, as its skeleton shows it: made once, before any weight is loaded."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmtune.model.blocks import is_tied
from llmtune.plan.stages import Facts, Plan, boundaries


@dataclass(frozen=True)
class Layout:
    """A plan laid over a model: its facts, the distance of every parameter, and what ever trains."""

    facts: Facts
    plan: Plan
    skeleton: PreTrainedModel
    """The base on the meta device."""
    tuned: nn.Module
    """A copy of the skeleton with the adapter in it."""
    distance: dict[str, int]
    """The distance of every parameter of `tuned` by name."""
    trained: dict[str, nn.Parameter]
    """The parameters that ever train, by name."""
    linear: tuple[list[str], list[str]]
    """The base's linear layers that are quantized, and those that stay; empty without model.quantize."""
    bits: int | None = None
    """The bits that those are quantized to."""
    forecasts: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """Predictions of memory that were computed from it, by their setting."""

    @cached_property
    def trained_distance(self) -> dict[str, int]:
        """The distance of every parameter that ever trains, by name."""
        return {name: self.distance[name] for name in self.trained}

    @cached_property
    def boundaries(self) -> list[int]:
        """The boundary of each stage: the number of blocks below the lowest one that has trained so far."""
        return boundaries(self.plan, self.trained_distance.values(), self.facts.blocks)

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings' matrix."""
        return is_tied(self.skeleton)
