"""Scores with their standard errors, paired differences, and the comparison of an answer with the true one."""

import json
import math
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict


class Score(TypedDict):
    """A mean over `n` rows, and its standard error: None for a single row."""

    value: float
    stderr: float | None
    n: int


class Difference(TypedDict):
    """The mean of new minus old over the same `n` rows; for 0/1 scores also rows won, rows lost and McNemar's p."""

    difference: float
    stderr: float | None
    n: int
    won: NotRequired[int]
    lost: NotRequired[int]
    p: NotRequired[float]


def score(values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """Return the mean of `values`, or with weights sum(values) / sum(weights), with its standard error."""
    weights = weights or [1.0] * len(values)
    value = sum(values) / sum(weights)
    return {"value": value, "stderr": _stderr(values, weights, value), "n": len(values)}


def difference(new: Sequence[float], old: Sequence[float], weights: Sequence[float] | None = None) -> Difference:
    """Return `new` minus `old` on the same rows, with its paired standard error; for 0/1 scores also McNemar's p."""
    assert len(new) == len(old), "paired scores are of the same rows"
    gap = score([a - b for a, b in zip(new, old, strict=True)], weights)
    result: Difference = {"difference": gap["value"], "stderr": gap["stderr"], "n": gap["n"]}
    if {*new, *old} <= {0, 1}:
        won, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((new, old), (old, new)))
        result |= {"won": won, "lost": lost, "p": mcnemar(won, lost)}
    return result


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


def parsed(text: str) -> Any:
    """Return the JSON object or array that a text is, None for anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def same(output: str, answer: str, as_json: bool) -> bool:
    """Compare an output with the true answer as stripped text, or as parsed JSON, in which true is not 1."""
    if not as_json:
        return output.strip() == answer.strip()
    value = parsed(output)
    return value is not None and _canonical(value) == _canonical(parsed(answer))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def format_score(value: float, error: float | None) -> str:
    """Format a score for tables in three decimals: value ± standard error."""
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
