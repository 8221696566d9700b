"""What every method has: an adapter, the plan for a model, and its words for `llmtune init`."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Self

from pydantic import model_validator

from llmtune.adapters.kinds import Adapter
from llmtune.adapters.none import NoAdapter
from llmtune.errors import PlanError
from llmtune.fields import Closed, Decay, Fraction
from llmtune.plan.distances import Distances, Everything, Top
from llmtune.plan.stages import Facts, Plan, Stage, decay_for


class BaseMethod(Closed):
    """A method: the adapter whose parameters train, and the plan that they follow."""

    why: ClassVar[str]
    """One sentence for a recipe that `llmtune init` writes."""
    example: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Lines of such a recipe's `method` section at good values, each with its comment."""
    title: ClassVar[str]
    """What people call the method."""
    stands_under: ClassVar[bool] = True
    """Whether an adapter is said to train under it; full adds nothing to an adapter's own name."""

    kind: str
    adapter: Adapter = NoAdapter()
    """The adapter whose parameters the plan trains; none trains the model's own."""

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts; raises PlanError where the model cannot follow."""

    def resolved(self, facts: Facts) -> Self:
        """The same method with the rate that `plan` chose for these facts written out."""
        return self.model_copy(update={"lr": self.plan(facts).stages[0].lr})

    @property
    def words(self) -> list[str]:
        """What tells it from other methods, whatever its settings are: its kind and the words of its adapter."""
        return [self.kind, *self.adapter.tags]

    @property
    def in_words(self) -> str:
        """The method as people call it: full fine-tuning, LoRA (rank 16), LoRA (rank 16) under gradual unfreezing."""
        adapter = self.adapter.title
        if self.adapter.trains_base:
            return self.title
        return f"{adapter} under {self.title}" if self.stands_under else adapter

    def stage(self, facts: Facts, until: float, trains: Distances, lr: float | None, decay: float = 1.0) -> Stage:
        """A stage at `lr`, or at the adapter's default rate for the model's size and the share that trains."""
        if lr is None:
            lr = self.default_rate(facts, trains.share(facts.blocks))
            if self.adapter.trains_base:
                lr = float(f"{lr * _lift(decay, min(trains.farthest(facts.blocks), facts.blocks)):.1e}")
        return Stage(until, trains, lr, decay)

    def default_rate(self, facts: Facts, share: float) -> float:
        """The adapter's rate at the output where `share` of the blocks trains; raises PlanError where it has none."""
        rate = self.adapter.default_rate(facts, share)
        if not 0 < rate < math.inf:
            raise PlanError("adapter", f"at these values its default learning rate would be {rate:g}; give lr")
        return rate


class Decaying(Closed):
    """Rates that fall with the distance from the output."""

    decay: Decay | None = None
    """Factor on the rate per block away from the output."""
    bottom_ratio: Fraction | None = None
    """The first block's rate as a share of the last one's; moves between model sizes, unlike decay."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.decay is not None and self.bottom_ratio is not None:
            raise PlanError("decay", "give decay or bottom_ratio, not both")
        return self

    def factor(self, facts: Facts) -> float:
        """The factor on the rate per block away from the output, 1.0 where none is given."""
        if self.bottom_ratio is not None:
            return decay_for(self.bottom_ratio, facts.blocks)
        return 1.0 if self.decay is None else self.decay


def _lift(decay: float, farthest: int) -> float:
    """How much higher the rate at the output is so that blocks learn about as fast as at one rate, in geometric mean.

    At most as much as for a bottom_ratio of 0.1, beyond which it was not measured.
    """
    return min(decay ** (-(max(1, farthest) - 1) / 2), 10**0.5)


def top_distances(reach: float | str, facts: Facts, key: str) -> Distances:
    """What a recipe's reach trains: a number of blocks, a share of them (rounded up), or all."""
    if isinstance(reach, str):
        return Everything()
    if isinstance(reach, float):
        return Top(math.ceil(reach * facts.blocks - 1e-9))
    if reach > facts.blocks + 1:
        limit = f"reach {reach} is beyond the model, which has {facts.blocks} blocks"
        raise PlanError(key, f"{limit}; try {facts.blocks}, or all with the embeddings")
    return Everything() if reach == facts.blocks + 1 else Top(reach)


def check_ends(ends: Sequence[float], key: str) -> None:
    """Raise PlanError where stages do not end at growing fractions, the last at 1."""
    for index, (before, after) in enumerate(pairwise(ends), 1):
        if after <= before:
            raise PlanError(key.format(index), f"stages end at growing fractions of training; {after} follows {before}")
    if ends[-1] != 1:
        raise PlanError(key.format(len(ends) - 1), f"the last stage ends at 1, not {ends[-1]}")
