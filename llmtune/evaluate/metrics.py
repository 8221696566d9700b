"""Scores with their standard errors, paired differences, and what counts as the same answer."""

import json
import math
from collections.abc import Sequence
from typing import Any

Score = dict[str, float | int | None]


def score(values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """Value, standard error and n of a mean; with weights, of the ratio sum(values) / sum(weights)."""
    weights = weights or [1.0] * len(values)
    value = sum(values) / sum(weights)
    return {"value": value, "stderr": _stderr(values, weights, value), "n": len(values)}


def difference(new: Sequence[float], old: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """`new` minus `old` on the same rows, with its paired standard error; for 0/1 scores also the exact McNemar p."""
    assert len(new) == len(old), "paired scores are of the same rows"
    found = score([a - b for a, b in zip(new, old, strict=True)], weights)
    result: Score = {"difference": found["value"], "stderr": found["stderr"], "n": found["n"]}
    if {*new, *old} <= {0, 1}:
        won, lost = (sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((new, old), (old, new)))
        result |= {"won": won, "lost": lost, "p": mcnemar(won, lost)}
    return result


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value that rows won and lost are equally likely."""
    rows = won + lost
    tail: int = sum(math.comb(rows, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**rows)


def _stderr(values: Sequence[float], weights: Sequence[float], ratio: float) -> float | None:
    """The linearised standard error of a ratio; None for a single row, which has none."""
    rows = len(values)
    if rows < 2:
        return None
    spread = sum((value - ratio * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return math.sqrt(spread * rows / (rows - 1)) / sum(weights)


def parsed(text: str) -> Any:
    """The JSON object or array that a text is, None where it is neither."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def same(output: str, answer: str, as_json: bool) -> bool:
    """Whether two answers are equal: as parsed JSON, where true is not 1, else as stripped text."""
    if not as_json:
        return output.strip() == answer.strip()
    found = parsed(output)
    return found is not None and _canonical(found) == _canonical(parsed(answer))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def format_score(found: Score, signs: int = 3) -> str:
    """A score as it stands in tables: value ± standard error."""
    error = found["stderr"]
    return f"{found['value']:.{signs}f}" + (f" ± {error:.{signs}f}" if error is not None else "")
