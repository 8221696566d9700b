"""The plan: one pure function (progress, distance) -> learning rate, from which everything else is derived.

Distance counts from the output: head and final norm 0, last block 1, ..., first block L, embeddings L+1.
"""

import math
from dataclasses import dataclass


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


def decay_for(bottom_ratio: float, blocks: int) -> float:
    """The decay per block that gives the first of `blocks` blocks `bottom_ratio` times the last one's rate."""
    return 1.0 if blocks < 2 else bottom_ratio ** (1 / (blocks - 1))


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a model: transformer blocks, hidden size, parameters."""

    blocks: int
    hidden: int
    parameters: int
