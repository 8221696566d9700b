"""Metrics of all rows at once, such as perplexity and BLEU: their values on resampled rows, for standard errors."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
from lm_eval.api.metrics import mean, mean_stderr

from llmtune.evaluation.metrics import FEWEST_RESAMPLES, finite
from llmtune.working import working

Aggregation = Callable[[Sequence[Any]], Any]
"""Items of rows in, one number out."""

RESAMPLES, TEXT_RESAMPLES = 1000, 100
"""How often rows are drawn again; less often for items with text, as BLEU and its like take long."""
SECONDS = 60.0
"""Resampling ends after that time, but not before FEWEST_RESAMPLES."""
SEED = 1234
_NUMBERS = (int, float, numpy.number, numpy.bool_)


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
