"""JSON answers: whether a text is one, and which of its fields are right."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "JSON", "tool calls"]
"""How an answer is compared."""


class FieldScore(NamedTuple):
    """How the fields of an answer agree with those of the true one: all three are from 0 to 1."""

    precision: float
    """The share of the answer's fields that the true answer has."""
    recall: float
    """The share of the true answer's fields that the answer has."""
    f1: float
    """Their harmonic mean."""


def parsed(text: str) -> Any:
    """Return the JSON object or array that a text is, None for anything else."""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def canonical(value: object) -> str:
    """Return a value as JSON in which the order of keys does not show."""
    return json.dumps(value, sort_keys=True)


def refuse_constant(constant: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{constant} is not JSON")


def fields(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Give the path and value of each field: keys and places in lists that lead to a text, a number or such.

    An empty object or list is a field of its own.
    """
    if not isinstance(value, dict | list) or not value:
        yield path, canonical(value)
        return
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in pairs:
        yield from fields(inner, (*path, name))


def score_fields(answer: str, truth: str) -> FieldScore:
    """Compare the fields of two JSON texts by path and value, in which true is not 1; an answer that is none has 0."""
    value, true = parsed(answer), Counter(fields(parsed(truth)))
    try:
        answered = Counter(fields(value)) if value is not None else Counter()
    except RecursionError:  # nested deeper than any true answer
        answered = Counter()
    if not answered:
        return FieldScore(0.0, 0.0, 0.0)
    right = (answered & true).total()
    return FieldScore(right / answered.total(), right / true.total(), 2 * right / (answered.total() + true.total()))
