"""Gradual unfreezing: the top first, then the middle, then the bottom."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtune.errors import PlanError
from llmtune.fields import Fraction, Positive, Reach, listed
from llmtune.methods.base import BaseMethod, Decaying, check_ends, top_distances
from llmtune.plan.stages import Facts, Plan


class Gradual(Decaying, BaseMethod):
    """Gradual unfreezing: the top first, then the middle, then the bottom."""

    why: ClassVar = "Gradual unfreezing: the top first, then the middle, then everything; steady on little data."
    example: ClassVar = (("reaches: [0.15, 0.6, all]", "the share of the blocks that each stage trains"),)
    title: ClassVar = "gradual unfreezing"

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
        check_ends(self.until or (1.0,), "until.{}")
        return self

    @property
    def words(self) -> list[str]:
        """What tells it from other methods: discriminative rates, too, as in ULMFiT."""
        return [*super().words, *(["discriminative"] if self.decay or self.bottom_ratio else [])]

    def plan(self, facts: Facts) -> Plan:
        """One stage per reach, each reaching farther than the one before."""
        tops = [top_distances(reach, facts, f"reaches.{index}") for index, reach in enumerate(self.reaches)]
        sizes = [top.farthest(facts.blocks) for top in tops]
        for index, (before, after) in enumerate(pairwise(sizes), 1):
            if after <= before:
                shown = f"{self.reaches[index]} after {self.reaches[index - 1]}"
                message = (
                    f"each stage reaches farther than the one before, not {shown} (in this model's blocks {sizes})"
                )
                raise PlanError(f"reaches.{index}", message)
        count = len(tops)
        ends = self.until or tuple((index + 1) / count for index in range(count))
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr,) * count
        stages = zip(ends, tops, rates, strict=True)
        return Plan(tuple(self.stage(facts, end, top, lr, self.factor(facts)) for end, top, lr in stages))

    def resolved(self, facts: Facts) -> Self:
        """The same method with each stage's rate for these facts written out."""
        return self.model_copy(update={"lr": tuple(stage.lr for stage in self.plan(facts).stages)})
