"""Discriminative rates: every layer adapts, the lower ones more slowly."""

from typing import ClassVar, Literal, Self

from llmtune.fields import Positive
from llmtune.methods.base import BaseMethod, Decaying
from llmtune.plan.distances import Everything
from llmtune.plan.stages import Facts, Plan


class Discriminative(Decaying, BaseMethod):
    """Every layer adapts, the lower ones more slowly."""

    why: ClassVar = "Discriminative rates: everything trains, the lower the more slowly; steady on little data."
    example: ClassVar = (("bottom_ratio: 0.1", "the first block's rate as a share of the last one's"),)
    title: ClassVar = "discriminative rates"

    kind: Literal["discriminative"]
    """Discriminative rates: (1, all, decay)."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that trains everything at falling rates; bottom_ratio 0.1 where neither factor is given."""
        return Plan((self.stage(facts, 1.0, Everything(), self.lr, self._falling().factor(facts)),))

    def resolved(self, facts: Facts) -> Self:
        """The same method with the rate for these facts and the default bottom_ratio written out."""
        lr = self.plan(facts).stages[0].lr
        return self._falling().model_copy(update={"lr": lr})

    def _falling(self) -> Self:
        has_factor = self.decay is not None or self.bottom_ratio is not None
        return self if has_factor else self.model_copy(update={"bottom_ratio": 0.1})
