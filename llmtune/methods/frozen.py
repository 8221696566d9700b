"""Frozen extractor: the low layers stay, the top adapts."""

from typing import ClassVar, Literal

from llmtune.fields import Positive, Reach
from llmtune.methods.base import BaseMethod, Decaying, top_distances
from llmtune.plan.stages import Facts, Plan


class Frozen(Decaying, BaseMethod):
    """Frozen extractor: the low layers stay, the top adapts."""

    why: ClassVar = "Frozen extractor: the low half stays and runs once per row, the top half adapts."
    example: ClassVar = (("reach: 0.5", "the share of the blocks that trains, from the output"),)
    title: ClassVar = "a frozen extractor"

    kind: Literal["frozen"]
    """Frozen extractor: (1, reach, decay)."""
    reach: Reach = 0.5
    """Farthest block from the output that trains (0: the final norm and an untied head), or a share of the blocks."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter, reach and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that trains the top only."""
        return Plan((self.stage(facts, 1.0, top_distances(self.reach, facts, "reach"), self.lr, self.factor(facts)),))
