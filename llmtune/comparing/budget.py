"""The minutes of a comparison, shared out: pure functions of numbers."""

import math
from dataclasses import dataclass

from llmtune.errors import RecipeError

FACTORS = (1.0, 2.5, 0.4)
"""The rates that are tried first, as multiples of the default one."""
EDGES = {0.4: 0.16, 2.5: 6.25}
"""The rate that is tried as well where the best one lies at an edge."""
MOST_TRIALS = len(FACTORS) + 1
"""Rates of a search at the most: one more where the best one lies at either edge."""
SEARCH = 1 / 3
"""The part of a share that the search of the rate takes."""
MOST_EPOCHS = 3
"""How often the recipe's epochs an arm may train at the most."""
FEWEST_STEPS = 8
"""The steps that an arm must be able to take for a comparison to be worth its time."""
TRIAL_STEPS, TRIAL_PART = 12, 0.15
"""The steps of a trial at the least, and their share of a training's: shorter ones favor rates that are too high."""
FEWEST_ROWS, MOST_ROWS = 16, 64
"""Validation rows of each loss: the same ones for all arms."""
MOST_VALIDATIONS = 6
VALIDATED = 0.1
"""The share of a training's time that validations may take."""


@dataclass(frozen=True)
class Costs:
    """Seconds of what is not training, and of a step, as far as they are known before an arm trains."""

    start: float
    """Of a worker: its imports, and the rows."""
    load: float
    """Of a training before its first step."""
    evaluation: float
    """Of a tuned model."""
    base: float
    """Of the untrained base, which is asked once."""
    step: float
    """Of an optimizer step, roughly."""

    def least(self, seeds: int) -> float:
        """The smallest share that an arm can do with."""
        return self.start + seeds * (self.load + FEWEST_STEPS * self.step + self.evaluation)


def share_of(seconds: float, shares: int) -> float:
    """The equal share of what is left."""
    return max(0.0, seconds) / max(1, shares)


def training_seconds(share: float, seeds: int, costs: Costs) -> float:
    """The seconds that each seed of each arm trains, once search, loading and evaluations are taken off its share."""
    rest = (share - costs.start) * (1 - SEARCH) - seeds * (costs.load + costs.evaluation)
    return max(FEWEST_STEPS * costs.step, rest / seeds)


@dataclass(frozen=True)
class Shares:
    """What the minutes are shared out over: arms and the scratch baseline at each size, with so many seeds."""

    arms: int
    scratch: bool
    sizes: int
    seeds: int

    @property
    def entrants(self) -> int:
        """How many shares there are."""
        return (self.arms + self.scratch) * self.sizes

    @property
    def words(self) -> str:
        """What they are: an arm and the scratch baseline at 3 sizes with 2 seeds."""
        arms = [{1: "an arm"}.get(self.arms, f"{self.arms} arms")] if self.arms else []
        sizes = f" at {self.sizes} sizes" if self.sizes > 1 else ""
        seeds = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        return f"{' and '.join([*arms, *['the scratch baseline'] * self.scratch])}{sizes} with {seeds}"


def check_minutes(minutes: float, spent: float, shares: Shares, costs: Costs, slots: int = 1) -> None:
    """Raise RecipeError, naming the minutes that work, where an arm's share is too small to train in.

    `spent` are the seconds that baselines take; `slots` arms run side by side.
    """
    entrants = shares.entrants
    least = costs.least(shares.seeds)
    rounds = math.ceil(entrants / slots)
    if not entrants or share_of(minutes * 60 - spent, rounds) >= least:
        return
    enough = (spent + rounds * least) / 60
    words = math.ceil(enough) if enough >= 2 else math.ceil(enough * 10) / 10
    message = f"is too little for {shares.words}; the nearest that works is --minutes {words:g}"
    raise RecipeError(f"--minutes {minutes:g}: {message}")


def steps_in(seconds: float, step: float, most: int) -> tuple[int, bool]:
    """Whole steps that fit into seconds, one at the least and `most` at the most; and whether that ended it."""
    steps = max(1, math.floor(seconds / max(step, 1e-9)))
    return min(steps, most), steps > most


def trial_steps(seconds: float, step: float, load: float, training: int) -> int:
    """Steps of each trial of a search that has so many seconds, for a training of so many steps; 0 for no search.

    Trials too short to tell, or a single one, are none.
    """
    step = max(step, 1e-9)
    shortest = min(training, max(TRIAL_STEPS, math.ceil(TRIAL_PART * training)))
    trials = min(MOST_TRIALS, math.floor(seconds / (load + shortest * step) + 1e-9))
    return 0 if trials < 2 else min(training, math.floor((seconds / trials - load) / step + 1e-9))


def checkpoints_at(steps: int, count: int) -> list[int]:
    """The steps after which a training is validated: so many, evenly, the last step among them."""
    return sorted({max(1, math.ceil(steps * number / count)) for number in range(1, count + 1)})


def validation_rows(seconds: float, step: float, batch: int) -> int:
    """Rows of each validation, so that six of them take about a tenth of a training of so many seconds."""
    trained = seconds / max(step, 1e-9) * batch
    return max(FEWEST_ROWS, min(MOST_ROWS, round(VALIDATED * 3 * trained / MOST_VALIDATIONS)))


def count_validations(steps: int, batch: int, rows: int, most: int = MOST_VALIDATIONS) -> int:
    """How often a training is validated on so many rows: a row forward takes a third of one that trains."""
    return max(2, min(most, math.floor(VALIDATED * 3 * steps * batch / max(1, rows))))
