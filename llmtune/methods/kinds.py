"""Methods as a recipe names them: each gives the plan for a model, and no other module asks which method it is."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtune.adapters.kinds import Adapter
from llmtune.adapters.none import NoAdapter
from llmtune.errors import PlanError
from llmtune.fields import Closed, Decay, Fraction, Positive, Reach, listed
from llmtune.plan.stages import Facts, Plan, Stage, decay_for

__all__ = [
    "METHODS",
    "Discriminative",
    "Facts",
    "Frozen",
    "Full",
    "Gradual",
    "Method",
    "PlanError",
    "StageSpec",
    "Staged",
]


class _Method(Closed):
    """What every method has."""

    kind: str
    adapter: Adapter = NoAdapter()
    """The adapter whose parameters the plan trains; none trains the model's own."""

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts; raises PlanError where the model cannot follow."""

    def resolved(self, facts: Facts) -> Self:
        """The same method with the rate that `plan` chose for these facts written out."""
        return self.model_copy(update={"lr": self.plan(facts).stages[0].lr})

    def _stage(self, facts: Facts, until: float, reach: int | None, lr: float | None, decay: float) -> Stage:
        share = 1.0 if reach is None else min(reach, facts.blocks) / facts.blocks
        return Stage(until, reach, lr or self.adapter.default_rate(facts, share), decay)


class _Decaying(Closed):
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


class Full(_Method):
    """Every layer adapts at one rate."""

    kind: Literal["full"]
    """Full: (1, all, 1)."""
    lr: Positive | None = None
    """Learning rate; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches everything."""
        return Plan((self._stage(facts, 1.0, None, self.lr, 1.0),))


class Frozen(_Decaying, _Method):
    """Frozen extractor: the low layers stay, the top adapts."""

    kind: Literal["frozen"]
    """Frozen extractor: (1, reach, decay)."""
    reach: Reach = 0.5
    """Farthest block from the output that trains (0: the final norm and an untied head), or a share of the blocks."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter, reach and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches the top only."""
        return Plan((self._stage(facts, 1.0, _in_blocks(self.reach, facts, "reach"), self.lr, self.factor(facts)),))


class Discriminative(_Decaying, _Method):
    """Every layer adapts, the lower ones more slowly."""

    kind: Literal["discriminative"]
    """Discriminative rates: (1, all, decay)."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches everything at falling rates; bottom_ratio 0.1 where neither factor is given."""
        return Plan((self._stage(facts, 1.0, None, self.lr, self._falling().factor(facts)),))

    def resolved(self, facts: Facts) -> Self:
        """The same method with the rate for these facts and the default bottom_ratio written out."""
        lr = self.plan(facts).stages[0].lr
        return self._falling().model_copy(update={"lr": lr})

    def _falling(self) -> Self:
        given = self.decay is not None or self.bottom_ratio is not None
        return self if given else self.model_copy(update={"bottom_ratio": 0.1})


class Gradual(_Decaying, _Method):
    """Gradual unfreezing: the top first, then the middle, then the bottom."""

    kind: Literal["gradual"]
    """Gradual unfreezing: one stage per reach."""
    reaches: Annotated[tuple[Reach, ...], BeforeValidator(listed), Field(min_length=2)] = (0.15, 0.5, "all")
    """How far each stage reaches, growing."""
    until: Annotated[tuple[Fraction, ...], BeforeValidator(listed)] | None = None
    """Where each stage ends, as fractions of training; equal spans where not given."""
    lr: Positive | Annotated[tuple[Positive, ...], BeforeValidator(listed)] | None = None
    """Rate at the output, one for all stages or one a stage; chosen by adapter, reach and size where not given."""

    @model_validator(mode="after")
    def _one_a_stage(self) -> Self:
        for name, value in (("until", self.until), ("lr", self.lr)):
            if isinstance(value, tuple) and len(value) != len(self.reaches):
                raise PlanError(name, f"gives {len(value)} values for {len(self.reaches)} reaches; give one a stage")
        _check_ends(self.until or (1.0,), "until.{}")
        return self

    def plan(self, facts: Facts) -> Plan:
        """One stage per reach, each reaching farther than the one before."""
        reaches = [_in_blocks(reach, facts, f"reaches.{index}") for index, reach in enumerate(self.reaches)]
        sizes = [facts.blocks + 1 if reach is None else reach for reach in reaches]
        for index, (before, after) in enumerate(pairwise(sizes), 1):
            if after <= before:
                shown = f"{self.reaches[index]} after {self.reaches[index - 1]}"
                message = (
                    f"each stage reaches farther than the one before, not {shown} (in this model's blocks {sizes})"
                )
                raise PlanError(f"reaches.{index}", message)
        count = len(reaches)
        ends = self.until or tuple((index + 1) / count for index in range(count))
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr,) * count
        stages = zip(ends, reaches, rates, strict=True)
        return Plan(tuple(self._stage(facts, end, reach, lr, self.factor(facts)) for end, reach, lr in stages))

    def resolved(self, facts: Facts) -> Self:
        """The same method with each stage's rate for these facts written out."""
        return self.model_copy(update={"lr": tuple(stage.lr for stage in self.plan(facts).stages)})


class StageSpec(_Decaying):
    """One stage of a staged method."""

    until: Fraction
    """Where it ends, as a fraction of training; the last ends at 1."""
    reach: Reach = "all"
    """Farthest block from the output that trains."""
    lr: Positive | None = None
    """Rate at the output; chosen by adapter, reach and model size where not given."""


class Staged(_Method):
    """Stages written out one by one."""

    kind: Literal["staged"]
    """Any stages."""
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(listed), Field(min_length=1)]
    """The stages in order."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_ends([stage.until for stage in self.stages], "stages.{}.until")
        return self

    def plan(self, facts: Facts) -> Plan:
        """The stages as written."""
        reaches = [_in_blocks(spec.reach, facts, f"stages.{index}.reach") for index, spec in enumerate(self.stages)]
        stages = zip(self.stages, reaches, strict=True)
        return Plan(tuple(self._stage(facts, spec.until, reach, spec.lr, spec.factor(facts)) for spec, reach in stages))

    def resolved(self, facts: Facts) -> Self:
        """The same method with each stage's rate for these facts written out."""
        pairs = zip(self.stages, self.plan(facts).stages, strict=True)
        return self.model_copy(update={"stages": tuple(spec.model_copy(update={"lr": s.lr}) for spec, s in pairs)})


def _in_blocks(reach: float | str, facts: Facts, key: str) -> int | None:
    """A reach in blocks, None for all; a fraction is a share of the blocks, rounded up."""
    if isinstance(reach, str):
        return None
    if isinstance(reach, float):
        return math.ceil(reach * facts.blocks - 1e-9)
    if reach > facts.blocks + 1:
        limit = f"reach {reach} is beyond the model, which has {facts.blocks} blocks"
        raise PlanError(key, f"{limit}; the nearest valid reach is {facts.blocks}, or all with the embeddings")
    return None if reach == facts.blocks + 1 else reach


def _check_ends(ends: Sequence[float], key: str) -> None:
    """Raise PlanError where stages do not end at growing fractions, the last at 1."""
    for index, (before, after) in enumerate(pairwise(ends), 1):
        if after <= before:
            raise PlanError(key.format(index), f"stages end at growing fractions of training; {after} follows {before}")
    if ends[-1] != 1:
        raise PlanError(key.format(len(ends) - 1), f"the last stage ends at 1, not {ends[-1]}")


Method = Annotated[Full | Frozen | Gradual | Discriminative | Staged, Field(discriminator="kind")]
METHODS = ("full", "frozen", "gradual", "discriminative", "staged")
