"""LISA (Pan 2024, arXiv 2403.17919): a few blocks at a time, drawn anew every few steps."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.errors import PlanError
from llmtune.fields import Positive
from llmtune.methods.base import BaseMethod
from llmtune.plan.distances import Drawn
from llmtune.plan.stages import Facts, Plan, Stage


class Lisa(BaseMethod):
    """A few blocks train at a time, drawn anew every few steps; embeddings, final norm and head always train."""

    why: ClassVar = (
        "LISA: two blocks at a time, drawn anew every 20 steps; gradients and optimizer states take little memory."
    )
    example: ClassVar = (
        ("blocks: 2", "how many blocks train at a time"),
        ("every: 20", "steps until they are drawn anew"),
    )
    title: ClassVar = "LISA"

    kind: Literal["lisa"]
    """Layerwise importance sampling (Pan 2024)."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """How many blocks train at a time; train.seed decides which."""
    every: Annotated[int, Field(ge=1)] = 20
    """Steps until the blocks are drawn anew."""
    lr: Positive | None = None
    """Learning rate; chosen by adapter and model size where not given, as for full."""

    def plan(self, facts: Facts) -> Plan:
        """One stage over blocks that are drawn anew; each rate follows the schedule from step 0 on.

        The rate is that of full training, since the embeddings train throughout (LMFlow's script uses 2e-5 at 3B).
        """
        if self.blocks > facts.blocks:
            raise PlanError(
                "blocks", f"{self.blocks} is more than the model's {facts.blocks} blocks; try {facts.blocks}"
            )
        among, ends = frozenset(range(1, facts.blocks + 1)), frozenset({0, facts.blocks + 1})
        lr = self.lr or self.default_rate(facts, 1.0)
        return Plan((Stage(1.0, Drawn(self.blocks, self.every, among, ends), lr),))
