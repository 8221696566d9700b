"""Stages written out one by one."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtune.errors import PlanError
from llmtune.fields import Fraction, Positive, Reach, listed
from llmtune.methods.base import BaseMethod, Decaying, check_ends, top_distances
from llmtune.plan.distances import Band, Distances
from llmtune.plan.stages import Facts, Plan


class StageSpec(Decaying):
    """One stage of a staged method."""

    until: Fraction
    """Where it ends, as a fraction of training; the last ends at 1."""
    reach: Reach = "all"
    """Farthest block from the output that trains."""
    nearest: Annotated[int, Field(ge=0)] = 0
    """Nearest block to the output that trains, 1 for the last one; 0 trains the final norm and an untied head too."""
    lr: Positive | None = None
    """Rate at the output; chosen by adapter, reach and model size where not given."""

    def distances(self, facts: Facts, key: str) -> Distances:
        """The distances from `nearest` to `reach`; raises PlanError where the model has no such band."""
        top = top_distances(self.reach, facts, f"{key}.reach")
        if self.nearest == 0:
            return top
        last = top.farthest(facts.blocks)
        if self.nearest > last:
            raise PlanError(f"{key}.nearest", f"{self.nearest} lies beyond the stage's reach; try {max(0, last)}")
        return Band(self.nearest, last)


class Staged(BaseMethod):
    """Stages written out one by one."""

    why: ClassVar = "Stages written out one by one: change them at will."
    example: ClassVar = (
        ("stages:", "until: share of the training; reach: share of the blocks"),
        ("  - {until: 0.4, reach: 0.4}", ""),
        ("  - {until: 1.0, reach: all, bottom_ratio: 0.1}", ""),
    )
    title: ClassVar = "stages"

    kind: Literal["staged"]
    """Any stages."""
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(listed), Field(min_length=1)]
    """The stages in order."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        check_ends([stage.until for stage in self.stages], "stages.{}.until")
        return self

    def plan(self, facts: Facts) -> Plan:
        """The stages as written."""
        sets = [spec.distances(facts, f"stages.{index}") for index, spec in enumerate(self.stages)]
        stages = zip(self.stages, sets, strict=True)
        return Plan(tuple(self.stage(facts, spec.until, one, spec.lr, spec.factor(facts)) for spec, one in stages))

    def resolved(self, facts: Facts) -> Self:
        """The same method with each stage's rate for these facts written out."""
        pairs = zip(self.stages, self.plan(facts).stages, strict=True)
        return self.model_copy(update={"stages": tuple(spec.model_copy(update={"lr": s.lr}) for spec, s in pairs)})
