"""Full fine-tuning: every layer adapts at one rate."""

from typing import ClassVar, Literal

from llmtune.fields import Positive
from llmtune.methods.base import BaseMethod
from llmtune.plan.distances import Everything
from llmtune.plan.stages import Facts, Plan


class Full(BaseMethod):
    """Every layer adapts at one rate."""

    why: ClassVar = "Full: every layer trains at one rate; it takes the most memory and forgets the most."
    title: ClassVar = "full fine-tuning"
    stands_under: ClassVar[bool] = False

    kind: Literal["full"]
    """Full: (1, all, 1)."""
    lr: Positive | None = None
    """Learning rate; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that trains everything."""
        return Plan((self.stage(facts, 1.0, Everything(), self.lr),))
