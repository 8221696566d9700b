"""The plan: one pure function (progress, distance) -> learning rate, from which everything else is derived.

Distance counts from the output: head and final norm 0, last block 1, ..., first block L, embeddings L+1.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

from llmtune.plan.distances import Distances


@dataclass(frozen=True)
class Stage:
    """A span of training: `until` (fraction), the distances that train, `lr` at distance 0, `decay` per distance."""

    until: float
    trains: Distances
    lr: float
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"a stage ends at a fraction of training in (0, 1], not {self.until}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"a learning rate is a positive number, not {self.lr}")
        if not 0 < self.decay <= 1.5:
            raise ValueError(f"decay lies in (0, 1.5], not {self.decay}")

    def rate(self, distance: int) -> float:
        """The learning rate at `distance` whenever it trains, 0.0 where this stage never trains it."""
        return self.lr * self.decay**distance if distance in self.trains else 0.0


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
        return len({stage.trains for stage in self.stages}) > 1 or self.redrawn

    @property
    def redrawn(self) -> bool:
        """Whether a stage draws anew what trains."""
        return any(stage.trains.redrawn for stage in self.stages)

    def peak(self, distance: int) -> float:
        """The highest stage rate that `distance` ever has; 0.0 means that it never trains."""
        return max(stage.rate(distance) for stage in self.stages)

    def limited_to(self, distances: Collection[int]) -> Self:
        """The same plan where only these distances have tensors; raises PlanError where too few are left to draw."""
        stages = (replace(stage, trains=stage.trains.limited_to(distances)) for stage in self.stages)
        return replace(self, stages=tuple(stages))


def boundaries(plan: Plan, distances: Collection[int], blocks: int) -> list[int]:
    """The boundary of each stage: how many blocks lie below the lowest one that has trained so far.

    `distances` are those of what ever trains. A block that trained no longer computes what the base computes.
    """
    result, deepest = [], -1
    for stage in plan.stages:
        deepest = max([deepest, *(distance for distance in distances if stage.rate(distance) > 0)])
        result.append(max(0, blocks - deepest))
    return result


def decay_for(bottom_ratio: float, blocks: int) -> float:
    """The decay per block that gives the first of `blocks` blocks `bottom_ratio` times the last one's rate."""
    return 1.0 if blocks < 2 else bottom_ratio ** (1 / (blocks - 1))


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a model: transformer blocks, hidden size, parameters."""

    blocks: int
    hidden: int
    parameters: int
