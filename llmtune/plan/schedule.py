"""A plan laid over optimizer steps, with warm-up and a decay shape."""

import math
from dataclasses import dataclass
from typing import Literal

from llmtune.plan.stages import Plan

Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A plan laid over `steps` optimizer steps with a warm-up (fraction of steps) and a decay shape."""

    plan: Plan
    steps: int
    warmup: float = 0.0
    shape: Shape = "constant"

    def __post_init__(self) -> None:
        starts = self.starts
        if self.steps < 1 or any(a >= b for a, b in zip(starts, [*starts[1:], self.steps], strict=True)):
            raise ValueError(f"{self.steps} steps cannot hold {len(starts)} stages: one of them would train nothing")

    @property
    def starts(self) -> list[int]:
        """The first step of each stage."""
        return [0, *(round(stage.until * self.steps) for stage in self.plan.stages[:-1])]

    @property
    def warmup_steps(self) -> int:
        """How many steps a rate takes to rise."""
        return math.ceil(self.warmup * self.steps - 1e-9)

    def stage_at(self, step: int) -> int:
        """The index of the stage that `step` (0-based) belongs to; the last stage for steps past the end."""
        return max(index for index, start in enumerate(self.starts) if start <= step)

    def first_step(self, distance: int) -> int | None:
        """The step at which `distance` first trains, None if it never does."""
        rates = (stage.rate(distance) for stage in self.plan.stages)
        return next((start for start, rate in zip(self.starts, rates, strict=True) if rate > 0), None)

    def rate(self, step: int, distance: int) -> float:
        """The learning rate of `distance` at `step`: stage rate x warm-up since it first trained x decay shape."""
        first = self.first_step(distance)
        if first is None or step < first:
            return 0.0
        stage_rate = self.plan.stages[self.stage_at(step)].rate(distance)
        rise = min(1.0, (step - first + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return stage_rate * rise * self._fall(step)

    def _fall(self, step: int) -> float:
        if self.shape == "constant":
            return 1.0
        progress = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        progress = min(1.0, progress)
        return 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
