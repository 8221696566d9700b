"""Means and paired differences of arms: errors that count rows and seeds, and how many rows could tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired

import numpy
import numpy.typing
from typing_extensions import TypedDict

from llmtune.evaluation.metrics import FEWEST_ROWS, NO_DIFFERENCE, TOO_FEW, mcnemar

Array = numpy.typing.NDArray[numpy.float64]
LEVEL = 0.05
_POWER = 7.84
"""(1.96 + 0.84)^2: rows x difference^2 / variance at which a test at 5% sees four differences of five."""


@dataclass(frozen=True)
class Sample:
    """Scores of one arm: `values` (seeds, rows), nan where a row has none, and a weight a row.

    Nothing trained where `is_trained` is False: then no seed can change them.
    """

    values: Array
    weights: Array
    is_trained: bool = True

    @property
    def seeds(self) -> int:
        """How many trainings there are."""
        return len(self.values)

    @property
    def scored(self) -> numpy.typing.NDArray[numpy.bool_]:
        """The rows (n,) that every training scored."""
        return numpy.isfinite(self.values).all(axis=0) & (self.weights > 0)


class SeedVariance(TypedDict):
    """Variance of a mean score between trainings, over rows without end, and its degrees of freedom."""

    value: float
    freedom: int


class Mean(TypedDict):
    """A mean over `n` rows and `seeds` trainings; its error counts both, and rows alone where there is one seed."""

    value: float | None
    stderr: float | None
    n: int
    seeds: int


class Gap(TypedDict):
    """One arm minus another on the same `n` rows, with error, 95% interval and p of no difference."""

    difference: float | None
    stderr: float | None
    n: int
    interval: NotRequired[tuple[float, float]]
    p: NotRequired[float]
    adjusted_p: NotRequired[float]
    """p after Holm, for as many differences as were looked at."""
    could_tell: NotRequired[int | None]
    """Rows that show a difference of this size four times of five; None where seeds vary too much for any number."""
    verdict: NotRequired[str]


def sample(values: Sequence[Sequence[float | None]], weights: Sequence[float] | None = None, **facts: bool) -> Sample:
    """Return the scores of trainings, row by row; trainings with other numbers of rows raise ValueError."""
    table = numpy.array([[math.nan if one is None else one for one in row] for row in values], dtype=float)
    ones = numpy.ones(table.shape[1]) if weights is None else numpy.array(weights, dtype=float)
    if table.ndim != 2 or len(ones) != table.shape[1]:
        raise ValueError("every training scores the same rows")
    return Sample(table, ones, **facts)


def seed_variance(samples: Sequence[Sample]) -> SeedVariance | None:
    """Estimate the variance between trainings, pooled over arms; None where each has one seed.

    Of two trainings one arm alone tells next to nothing; that arms vary alike is the price of a usable number.
    """
    known = [(one.seeds - 1, _seed_part(one)) for one in samples if one.is_trained and one.seeds > 1]
    parts = [(freedom, part) for freedom, part in known if part is not None]
    freedom = sum(count for count, _ in parts)
    if not freedom:
        return None
    return {"value": max(0.0, sum(count * part for count, part in parts) / freedom), "freedom": freedom}


def _seed_part(one: Sample) -> float | None:
    """Variance between the seeds' means, less what differs from row to row by chance."""
    table = _linear(one, one.scored)
    rows, means = table.shape[1], table.mean(axis=1)
    if rows < 2:
        return None
    rest = table - table.mean(axis=0) - means[:, None] + table.mean()
    chance = float((rest**2).sum()) / ((one.seeds - 1) * (rows - 1)) / rows
    return float(means.var(ddof=1)) - chance


def _linear(one: Sample, rows: numpy.typing.NDArray[numpy.bool_]) -> Array:
    """Scores (seeds, rows) whose mean is the weighted one, as the delta method linearizes a ratio."""
    values, weights = one.values[:, rows], one.weights[rows]
    if not rows.any():
        return values
    ratio = values.mean(axis=0).sum() / weights.sum()
    return ratio + (values - ratio * weights) * (len(weights) / weights.sum())


def mean(one: Sample, between: SeedVariance | None) -> Mean:
    """Return an arm's mean with its standard error over rows and seeds."""
    table = _linear(one, one.scored)
    rows = table.shape[1]
    if not rows:
        return {"value": None, "stderr": None, "n": 0, "seeds": one.seeds}
    of_rows = float(table.mean(axis=0).var(ddof=1)) / rows if rows > 1 else None
    stderr = None if of_rows is None else math.sqrt(of_rows + _of_seeds([one], between))
    return {"value": float(table.mean()), "stderr": stderr, "n": rows, "seeds": one.seeds}


def _of_seeds(samples: Sequence[Sample], between: SeedVariance | None) -> float:
    """What the drawing of seeds adds to a variance."""
    return sum(between["value"] / one.seeds for one in samples if one.is_trained) if between else 0.0


def gap(new: Sample, old: Sample, between: SeedVariance | None) -> Gap:
    """Return `new` minus `old`, paired by row; seeds are no pairs, since each arm draws from its own trainings.

    0/1 scores of one training each have McNemar's exact p, others that of a t-test. One row has a difference alone.
    Raises ValueError for other rows.
    """
    if len(new.weights) != len(old.weights):
        raise ValueError("differences are of the same rows")
    both = new.scored & old.scored
    rows = int(both.sum())
    if not rows:
        return {"difference": None, "stderr": None, "n": 0}
    change = _linear(new, both).mean(axis=0) - _linear(old, both).mean(axis=0)
    value = float(change.mean())
    if rows < 2:
        return {"difference": value, "stderr": None, "n": rows}
    of_rows = float(change.var(ddof=1)) / rows
    of_seeds = _of_seeds([new, old], between)
    stderr = math.sqrt(of_rows + of_seeds)
    freedom = _freedom(of_rows, rows - 1, of_seeds, between)
    exact = None if of_seeds else _exact(new, old, both)
    p = 1.0 if rows < FEWEST_ROWS else _p(value, stderr, freedom) if exact is None else exact
    bounds = _interval(value, stderr, freedom)
    tell = rows_to_tell(value, float((change**2).mean()), of_seeds)
    return {"difference": value, "stderr": stderr, "n": rows, "interval": bounds, "p": p, "could_tell": tell}


def _exact(new: Sample, old: Sample, rows: numpy.typing.NDArray[numpy.bool_]) -> float | None:
    """McNemar's p for 0/1 scores of one training each; None for others."""
    if new.seeds > 1 or old.seeds > 1:
        return None
    a, b = new.values[0, rows], old.values[0, rows]
    if not (numpy.isin(a, (0, 1)).all() and numpy.isin(b, (0, 1)).all()):
        return None
    return mcnemar(int((a > b).sum()), int((b > a).sum()))


def _freedom(of_rows: float, rows: int, of_seeds: float, between: SeedVariance | None) -> float:
    """Degrees of freedom of a sum of two variances, after Welch and Satterthwaite."""
    if not of_seeds or between is None:
        return float(rows)
    return (of_rows + of_seeds) ** 2 / (of_rows**2 / rows + of_seeds**2 / between["freedom"])


def _p(value: float, stderr: float, freedom: float) -> float:
    from scipy.special import stdtr

    if not stderr:
        return 0.0 if value else 1.0
    return float(2 * stdtr(freedom, -abs(value) / stderr))


def _interval(value: float, stderr: float, freedom: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 1 - LEVEL / 2)) * stderr
    return value - half, value + half


def rows_to_tell(difference: float, square: float, of_seeds: float = 0.0) -> int | None:
    """Return how many rows show such a difference at 5% four times of five.

    `square` is the mean square of a row's difference: for 0/1 scores the share of rows on which two arms disagree.
    None for no difference at all, and where the seeds alone hide it, so that no number of rows helps.
    """
    left = difference**2 - _POWER * of_seeds
    return math.ceil(_POWER * square / left) if left > 0 and difference else None


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values after Holm, in their order: each is the level at which its difference counts among all."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    adjusted, highest = [1.0] * len(chances), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(chances) - place) * chances[index]))
        adjusted[index] = highest
    return adjusted


def judge(gaps: Sequence[Gap], higher_is_better: bool) -> None:
    """Add to each of the differences that are looked at together its adjusted p and a verdict in words."""
    for one, p in zip(gaps, holm([one.get("p", 1.0) for one in gaps]), strict=True):
        one["adjusted_p"] = p
        change = one["difference"]
        if change is None or one["n"] < FEWEST_ROWS:
            one["verdict"] = TOO_FEW
        elif p >= LEVEL:
            one["verdict"] = NO_DIFFERENCE
        else:
            one["verdict"] = "better" if (change > 0) == higher_is_better else "worse"
