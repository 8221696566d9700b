"""The plan: one pure function (progress, distance) -> learning rate, from which everything else is derived.

Distance counts from the output: head and final norm 0, last block 1, ..., first block L, embeddings L+1.
"""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Stage:
    """A span of training: `until` (fraction), `reach` (farthest distance, None = all), `lr` at 0, `decay` per step."""

    until: float
    reach: int | None
    lr: float
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"a stage ends at a fraction of training in (0, 1], not {self.until}")
        if self.reach is not None and self.reach < 0:
            raise ValueError(f"a stage that reaches {self.reach} trains nothing; the nearest valid reach is 0")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"a learning rate is a positive number, not {self.lr}")
        if not 0 < self.decay <= 1.5:
            raise ValueError(f"decay lies in (0, 1.5], not {self.decay}")

    def rate(self, distance: int) -> float:
        """The learning rate at `distance`, 0.0 where this stage is frozen."""
        if self.reach is not None and distance > self.reach:
            return 0.0
        return self.lr * self.decay**distance


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order; the last one ends at 1."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        ends = [stage.until for stage in self.stages]
        if not ends or ends[-1] != 1 or ends != sorted(set(ends)):
            raise ValueError(f"stages end at increasing fractions, the last at 1, not {ends}")

    @property
    def staged(self) -> bool:
        """Whether the set of trained tensors changes during the run."""
        return len({stage.reach for stage in self.stages}) > 1

    @property
    def reach(self) -> int | None:
        """The farthest distance that ever trains, None for all."""
        reaches = [stage.reach for stage in self.stages]
        return None if None in reaches else max(reach for reach in reaches if reach is not None)

    def peak(self, distance: int) -> float:
        """The highest stage rate that `distance` ever has; 0.0 means that it never trains."""
        return max(stage.rate(distance) for stage in self.stages)


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


def decay_for(bottom_ratio: float, blocks: int) -> float:
    """The decay per block that gives the first of `blocks` blocks `bottom_ratio` times the last one's rate."""
    return 1.0 if blocks < 2 else bottom_ratio ** (1 / (blocks - 1))
