"""Scores with their standard errors and intervals, and paired differences."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy
import numpy.typing


class Score(TypedDict):
    """A metric over `n` rows, None where it is not finite, and its standard error, None for a single row."""

    value: float | None
    stderr: float | None
    n: int
    interval: NotRequired[tuple[float, float]]
    """Bounds between which 95% of its values lie on rows drawn with replacement (percentile bootstrap)."""


class Difference(TypedDict):
    """New minus old over the same `n` rows; for 0/1 scores also rows won, rows lost and McNemar's p.

    The 95% interval is of resampled rows, the same ones for both. For a metric of all rows at once, such as
    perplexity: the difference of both values, with its standard error from resampled rows too. None where one of the
    two is not finite.
    """

    difference: float | None
    stderr: float | None
    n: int
    won: NotRequired[int]
    lost: NotRequired[int]
    p: NotRequired[float]
    interval: NotRequired[tuple[float, float]]
    verdict: NotRequired[str]
    """What was measured, in words: one of `verdict`'s; higher or lower where nobody knows which one is better."""


NO_DIFFERENCE, NOT_FINITE = "no difference measured", "not finite"
TOO_FEW = "too few rows to tell"
FEWEST_ROWS = 6
"""Below that no test can tell at 5%: five rows that all say the same have p = 0.0625."""
FEWEST_RESAMPLES = 20
RESAMPLES, SEED = 1000, 1234
"""How often rows are drawn again, and the seed by which."""
_DRAWN = 200_000_000
"""Rows that are drawn at most, but for 200 times."""
_TOGETHER = 1 << 20
"""Rows that are drawn in one call."""
Array = numpy.typing.NDArray[numpy.float64]


def score(values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """Return the mean of `values`, or with weights sum(values) / sum(weights), with its standard error."""
    weights = weights or [1.0] * len(values)
    value = sum(values) / sum(weights) if values else math.nan
    if not math.isfinite(value):
        return {"value": None, "stderr": None, "n": len(values)}
    stderr = _stderr(values, weights, value)
    return with_interval({"value": value, "stderr": stderr, "n": len(values)}, resampled_ratios(values, weights))


def difference(new: Sequence[float], old: Sequence[float], weights: Sequence[float] | None = None) -> Difference:
    """Return `new` minus `old` on the same rows, with its paired standard error; for 0/1 scores also McNemar's p."""
    assert len(new) == len(old), "paired scores are of the same rows"
    gap = score([a - b for a, b in zip(new, old, strict=True)], weights)
    result: Difference = {"difference": gap["value"], "stderr": gap["stderr"], "n": gap["n"]}
    result |= {"interval": gap["interval"]} if "interval" in gap else {}
    if {*new, *old} <= {0, 1}:
        won, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((new, old), (old, new)))
        result |= {"won": won, "lost": lost, "p": mcnemar(won, lost)}
    return result


def verdict(gap: Difference, higher_is_better: bool | None) -> str:
    """Say in words what a difference means; one that chance explains at 5% is none that was measured."""
    change = gap["difference"]
    if change is None:
        return NOT_FINITE
    if not _is_measured(gap, change):
        return TOO_FEW if gap["n"] < FEWEST_ROWS else NO_DIFFERENCE
    if higher_is_better is None:
        return "higher" if change > 0 else "lower"
    return "better" if (change > 0) == higher_is_better else "worse"


def _is_measured(gap: Difference, change: float) -> bool:
    if "p" in gap:
        return gap["p"] < 0.05
    if gap["n"] < FEWEST_ROWS or gap["stderr"] is None or not change:
        return False
    if "interval" in gap:
        low, high = gap["interval"]
        return low > 0 or high < 0
    return abs(change) > 2 * gap["stderr"]


def resampled_sums(statistics: Array) -> Array:
    """Return the sums (R, K) of rows' statistics (N, K) over N rows drawn with replacement, R times.

    The same rows are drawn for every model, so that the differences of two models' values are those of the same rows.
    """
    rows = len(statistics)
    generator = numpy.random.default_rng(SEED)
    times = max(200, min(RESAMPLES, _DRAWN // max(1, rows)))
    sums = []
    for start in range(0, times, (together := max(1, _TOGETHER // max(1, rows)))):
        number = min(together, times - start)
        drawn = generator.integers(0, rows, (number, rows)) + rows * numpy.arange(number)[:, None]
        counts = numpy.bincount(drawn.ravel(), minlength=number * rows).reshape(number, rows)
        sums.append(counts.astype(float) @ statistics)
    return numpy.concatenate(sums)


def resampled_ratios(values: Sequence[float], weights: Sequence[float]) -> list[float | None]:
    """Return sum(values) / sum(weights) on rows drawn with replacement; nothing for fewer than two rows."""
    if len(values) < 2:
        return []
    sums = resampled_sums(numpy.array([values, weights], dtype=float).T)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[:, 0] / sums[:, 1]
    return [finite(ratio) for ratio in ratios]


def with_interval(score: Score, resampled: Sequence[float | None]) -> Score:
    """Return a score with the 95% interval of its resampled values, where they give one."""
    bounds = interval(resampled) if score["value"] is not None else None
    return {**score, "interval": bounds} if bounds else score


def spread(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation of resampled values; None where one is not finite, or with fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def gaps(new: Sequence[float | None], old: Sequence[float | None]) -> list[float | None]:
    """Return new minus old, resample by resample; as many as both have."""
    return [None if a is None or b is None else a - b for a, b in zip(new, old, strict=False)]


def interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Return the bounds between which 95% of the resampled values lie; None where one is not finite."""
    known = sorted(value for value in values if value is not None)
    if len(known) != len(values) or len(known) < FEWEST_RESAMPLES:
        return None
    cut = len(known) // 40
    return known[cut], known[-1 - cut]


def finite(value: Any) -> float | None:
    """Return a number as a float, None for one that is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


def mcnemar(won: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: won and lost rows are equally likely."""
    rows = won + lost
    tail: int = sum(math.comb(rows, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**rows)


def _stderr(values: Sequence[float], weights: Sequence[float], ratio: float) -> float | None:
    """Return the linearized standard error of a ratio; None for a single row, which has none."""
    rows = len(values)
    if rows < 2:
        return None
    spread = sum((value - ratio * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return math.sqrt(spread * rows / (rows - 1)) / sum(weights)


def format_score(value: float | None, error: float | None, bounds: Sequence[float] | None = None) -> str:
    """Format a score for tables in three decimals: value ± standard error [95% interval], or that it is not finite."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    around = f" [{format_interval(bounds)}]" if bounds else ""
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "") + around


def format_interval(bounds: Sequence[float] | None, sign: str = "") -> str:
    """Format the bounds of an interval, those of a difference with the sign "+"; "" for none."""
    return " to ".join(f"{bound:{sign}.3f}" for bound in bounds or ())


def format_difference(gap: Difference) -> str:
    """Format a difference as a score with its sign, + or -."""
    text = format_score(gap["difference"], gap["stderr"])
    return text if gap["difference"] is None or text.startswith("-") else f"+{text}"
