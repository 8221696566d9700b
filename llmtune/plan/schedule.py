"""A plan laid over optimizer steps, with warm-up and a decay shape."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from llmtune.plan.stages import Plan, Stage

Shape = Literal["cosine", "linear", "constant"]
Over = Literal["run", "stage"]


@dataclass(frozen=True)
class Schedule:
    """A plan laid over `steps` optimizer steps: warm-up (fraction of steps), decay shape, seed of what is drawn.

    Warm-up and shape span the whole run, or each stage anew.
    """

    plan: Plan
    steps: int
    warmup: float = 0.0
    shape: Shape = "constant"
    seed: int = 0
    over: Over = "run"

    def __post_init__(self) -> None:
        starts = self.starts
        if self.steps < 1 or any(a >= b for a, b in zip(starts, [*starts[1:], self.steps], strict=True)):
            raise ValueError(f"{self.steps} steps cannot hold {len(starts)} stages: one of them would train nothing")

    @property
    def starts(self) -> list[int]:
        """The first step of each stage."""
        return [0, *(round(stage.until * self.steps) for stage in self.plan.stages[:-1])]

    @property
    def ends(self) -> list[int]:
        """The step after the last one of each stage."""
        return [*self.starts[1:], self.steps]

    @property
    def warmup_steps(self) -> int:
        """How many steps a rate takes to rise, where the schedule spans the run."""
        return _warmup_steps(self.warmup, self.steps)

    def stage_at(self, step: int) -> int:
        """The index of the stage that `step` (0-based) belongs to; the last stage for steps past the end."""
        return max(index for index, start in enumerate(self.starts) if start <= step)

    def first_step(self, distance: int) -> int | None:
        """The first step of the first stage that may train `distance`, None if none does; its warm-up starts there."""
        rates = (stage.rate(distance) for stage in self.plan.stages)
        return next((start for start, rate in zip(self.starts, rates, strict=True) if rate > 0), None)

    def trains(self, step: int, distance: int) -> bool:
        """Whether `distance` trains at `step`."""
        return distance in self._stage(step).trains.at(step, self.seed)

    def ever_trains(self, distance: int) -> bool:
        """Whether `distance` trains at any step."""
        spans = zip(self.plan.stages, self.starts, self.ends, strict=True)
        changes = (step for stage, start, end in spans for step in stage.trains.changes(start, end))
        return any(self.trains(step, distance) for step in changes)

    def moves(self, distance: int, times: int) -> bool:
        """Whether the rate of `distance` is above zero in at least that many steps."""
        rates = (self.rate(step, distance) for step in range(self.first_step(distance) or 0, self.steps))
        return sum(1 for _ in islice((rate for rate in rates if rate > 0), times)) == times

    def redraws(self, step: int) -> bool:
        """Whether the stage of `step` draws anew what trains."""
        return self._stage(step).trains.redrawn

    def rate(self, step: int, distance: int) -> float:
        """The learning rate of `distance` at `step`: stage rate x warm-up since its first step x decay shape."""
        first = self.first_step(distance)
        if first is None or step < first or not self.trains(step, distance):
            return 0.0
        start, end = self._span(step)
        warmup_steps = _warmup_steps(self.warmup, end - start)
        rise = min(1.0, (step - max(first, start) + 1) / warmup_steps) if warmup_steps else 1.0
        return self._stage(step).rate(distance) * rise * self._fall(step - start, end - start, warmup_steps)

    def _stage(self, step: int) -> Stage:
        return self.plan.stages[self.stage_at(step)]

    def _span(self, step: int) -> tuple[int, int]:
        """The first step of what warm-up and shape are laid over at `step`, and the step after its last one."""
        if self.over == "run":
            return 0, self.steps
        index = self.stage_at(step)
        return self.starts[index], self.ends[index]

    def _fall(self, step: int, steps: int, warmup_steps: int) -> float:
        """The decay shape at a step of a span of so many."""
        if self.shape == "constant":
            return 1.0
        progress = min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))
        return 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _warmup_steps(warmup: float, steps: int) -> int:
    """How many of a span's steps a rate takes to rise."""
    return math.ceil(warmup * steps - 1e-9)
