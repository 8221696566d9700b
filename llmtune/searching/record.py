"""What tune.json holds: the shape of a search, which the command, its page and tests read."""

from typing import Any, NotRequired, TypedDict

from llmtune.arms.record import Point
from llmtune.searching.study import State


class TrialRecord(TypedDict):
    """A trial: its values, and what came of it."""

    number: int
    values: dict[str, Any]
    state: State
    loss: float | None
    """The validation loss at its end, or where it was ended early; None where it failed."""
    seconds: float
    """From its values to its result, with start-up."""
    steps: int | None
    curve: list[Point]
    reason: NotRequired[str]
    """Why it failed, or was ended early."""


class SearchRecord(TypedDict):
    """A search: what was asked, every trial, and the best one."""

    version: int
    recipe: str
    """The recipe's file."""
    set: list[str]
    base: str
    method: str
    """The method in words."""
    over: dict[str, str]
    """What was drawn for each key, as `--over` has it."""
    log: list[str]
    """The keys that were drawn by their logarithm."""
    trials: list[TrialRecord]
    best: int
    """The number of the trial with the lowest loss at its end."""
    importance: dict[str, float]
    """The share of what differs between trials that each key explains; empty for few trials or one key."""
    seconds: float
    """Spent on all of it, over every time that it went on."""
    winner: str
    """The recipe with the best values."""
    study: str
    """The URL by which Optuna and its dashboard open the study."""
    page: str
