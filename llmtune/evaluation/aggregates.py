"""Metrics of all rows at once, such as perplexity and BLEU: their values on resampled rows, for standard errors."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from lm_eval.api.metrics import mean, mean_stderr

from llmtune.evaluation.metrics import (
    FEWEST_RESAMPLES,
    RESAMPLES,
    SEED,
    Array,
    Score,
    finite,
    resampled_ratios,
    resampled_sums,
    spread,
    with_interval,
)
from llmtune.evaluation.results import Result
from llmtune.working import working

Aggregation = Callable[[Sequence[Any]], Any]
"""Items of rows in, one number out."""

TEXT_RESAMPLES = 100
"""How often rows whose items hold text are drawn again: BLEU and its like take long."""
SECONDS = 60.0
"""Resampling ends after that time, but not before FEWEST_RESAMPLES."""
_NUMBERS = (int, float, numpy.number, numpy.bool_)


@dataclass(frozen=True)
class OfSums:
    """A metric that follows from sums over its rows, such as chrF from counts: resampled at once, without the texts."""

    of: Callable[[Array], Array]
    """Sums (R, K) in, values (R,) out."""

    def __call__(self, items: Sequence[Sequence[float]]) -> float:
        """Return the metric of rows, each with its K statistics."""
        return float(self.of(numpy.asarray(items, dtype=float).sum(0, keepdims=True))[0])

    def resampled(self, items: Sequence[Sequence[float]]) -> list[float | None]:
        """Return the metric on rows drawn with replacement, again and again."""
        return [finite(value) for value in self.of(resampled_sums(numpy.asarray(items, dtype=float)))]


def add_metric(
    result: Result,
    name: str,
    title: str,
    value: float | None,
    aggregation: Aggregation,
    items: Mapping[int, Any],
    rows: int,
) -> None:
    """Add a metric: one that is the mean of its rows with their scores, any other one with its resampled values."""
    values = list(items.values())
    if is_row_mean(aggregation, values):
        stderr = row_mean_stderr(values)
        result["scores"][title] = [finite(items[row]) if row in items else None for row in range(rows)]
        resampled = resampled_ratios([float(item) for item in values], [1.0] * len(values))
    else:
        resampled = resample(aggregation, items, rows, name) if len(items) > 1 else []
        result["resamples"][title], stderr = resampled, spread(resampled)
    score: Score = {"value": value, "stderr": None if value is None else stderr, "n": len(items)}
    result["metrics"][title] = with_interval(score, resampled)


def is_row_mean(aggregation: Aggregation, items: Sequence[Any]) -> bool:
    """Tell whether a metric is the mean of numbers, one a row, which have a standard error without resampling."""
    return aggregation is mean and all(isinstance(item, _NUMBERS) for item in items)


def row_mean_stderr(items: Sequence[float]) -> float | None:
    """Return lm-eval's own standard error of a mean; None for a single row."""
    return finite(mean_stderr(items)) if len(items) > 1 else None


def resample(aggregation: Aggregation, items: Mapping[int, Any], rows: int, name: str) -> list[float | None]:
    """Return the metric on rows drawn with replacement, again and again; None where it is not a finite number.

    The same rows are drawn for every model, so that the differences of two models' values are those of the same rows.
    `items` are by row: a task may leave rows out.
    """
    if isinstance(aggregation, OfSums):
        return aggregation.resampled(list(items.values()))
    number = TEXT_RESAMPLES if any(_holds_text(item) for item in items.values()) else RESAMPLES
    generator = numpy.random.default_rng(SEED)
    values: list[float | None] = []
    began = time.monotonic()
    with working(f"{name}: standard error by resampling", number, "resamples") as step:
        while len(values) < number and (len(values) < FEWEST_RESAMPLES or time.monotonic() - began < SECONDS):
            drawn = generator.integers(0, rows, rows).tolist()
            values.append(_value(aggregation, [items[row] for row in drawn if row in items]))
            step()
    return values


def _value(aggregation: Aggregation, items: Sequence[Any]) -> float | None:
    """Return the metric of some rows; None where it has none, as with a division by zero."""
    try:
        return finite(aggregation(items)) if items else None
    except (ArithmeticError, ValueError):
        return None


def _holds_text(item: object) -> bool:
    return isinstance(item, str) or (isinstance(item, list | tuple) and any(_holds_text(part) for part in item))
