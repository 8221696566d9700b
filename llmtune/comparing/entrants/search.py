"""The search of an arm's learning rate: short trainings at multiples of the default rate, with successive halving."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llmtune.arms.record import Try
from llmtune.comparing.budget import EDGES, FACTORS
from llmtune.comparing.entrants.session import Session, rates_of
from llmtune.errors import Interrupted, LlmtuneError, TrainingError
from llmtune.files import delete
from llmtune.searching.space import Choice, Values
from llmtune.searching.study import Study, Trial, Tried
from llmtune.searching.watch import Watch

VALIDATIONS = 4
"""Validations of a trial at the most; half of the trials may end at the second one."""
_KEY = "factor"
_ALL = Choice(tuple(sorted({*FACTORS, *EDGES.values()})))
_KEPT = "the rate is too high or the rows are too hard for it"


@dataclass(frozen=True)
class Pace:
    """What a training takes here: seconds before its first step, and of a step."""

    load: float
    step: float


@dataclass
class Search:
    """The trials of one entrant, in a study that lies in the entrant's folder."""

    session: Session
    folder: Path
    facts: Mapping[str, object]
    steps: int
    """Of each trial."""
    memory: Mapping[str, str]
    """How the memory section differs."""
    tell: Callable[[list[Try]], None]
    """Called after each trial with all of them."""

    def run(self, until: float, clock: Callable[[], float] = time.monotonic) -> Pace | None:
        """Try rates until the best lies inside, or no trial fits before `until`; gives the pace of the latest one.

        Raises TrainingError where every rate failed, Interrupted after a stop signal.
        """
        study = self._open()
        pace, longest = None, 0.0
        while _next(study):
            began = clock()
            if study.best is not None and began + longest > until:
                break
            pace = self._try(study.ask()) or pace
            longest = max(longest, clock() - began)
            self.tell(self.tries(study))
        if study.best is None:
            reasons = [tried.reason for tried in study.trials if tried.reason]
            raise TrainingError(f"no rate could be trained with: {reasons[-1] if reasons else _KEPT}")
        self.tell(self.tries(study))
        return pace

    def _open(self) -> Study:
        first = [{_KEY: factor} for factor in FACTORS]
        return Study.open(self.folder / "study.db", self.facts, {_KEY: _ALL}, pruner="halving", first=first)

    def _try(self, trial: Trial) -> Pace | None:
        """Train with a trial's rate, and leave nothing but its numbers; gives the pace where it came to a step."""
        recipe = self.session.variant(_factor(trial.values), self.steps, memory=self.memory)
        steps = self.session.validations(self.steps, VALIDATIONS)
        watch = Watch(steps, report=lambda number, point: trial.report(number, point["loss"]))
        began = time.monotonic()
        try:
            load = self.session.try_out(recipe, self.folder, watch)
        except Interrupted:
            raise
        except LlmtuneError as error:
            trial.fail(str(error), seconds=time.monotonic() - began, steps=self.steps)
            return None
        facts = {"seconds": time.monotonic() - began, "steps": watch.steps}
        if watch.ended_early:
            trial.prune(**facts)
        else:
            trial.tell(watch.last_loss if watch.last_loss is not None else float("nan"), **facts)
        return Pace(load, watch.step_seconds)

    def tries(self, study: Study) -> list[Try]:
        """The trials that ended, as compare.json has them."""
        ended = [tried for tried in study.trials if tried.state in ("complete", "pruned", "failed") and tried.values]
        return [self._told(tried) for tried in ended]

    def _told(self, tried: Tried) -> Try:
        factor = _factor(tried.values)
        rates = rates_of(self.session.variant(factor, self.steps).method)
        steps, seconds = int(tried.facts.get("steps", 0)), float(tried.facts.get("seconds", tried.seconds))
        state = cast(Any, tried.state)
        told: Try = {
            "lr": rates, "factor": factor, "steps": steps, "seconds": seconds, "loss": tried.loss, "state": state
        }  # fmt: skip
        return {**told, "reason": tried.reason} if tried.reason else told


def remove_leftovers(folder: Path) -> None:
    """Remove what the trials of killed processes left."""
    for left in folder.glob(".trial-*"):
        delete(left)


def best_factor(tries: list[Try]) -> float:
    """The factor of the complete trial with the lowest loss; 1 where no rate was searched."""
    complete = [one for one in tries if one["state"] == "complete" and one["loss"] is not None]
    return min(complete, key=lambda one: cast(float, one["loss"]))["factor"] if complete else 1.0


def _next(study: Study) -> bool:
    """Whether a rate is left to try: one that waits, or one beyond the edge at which the best one lies."""
    if study.waits:
        return True
    tried = {_factor(one.values) for one in study.trials if one.values}
    edge = _factor(study.best.values) if study.best else min(tried)
    if edge not in EDGES or EDGES[edge] in tried:
        return False
    study.enqueue({_KEY: EDGES[edge]})
    return True


def _factor(values: Values) -> float:
    return float(str(values[_KEY]))
