"""Which arm wins: the best score, and among arms within one standard error of it the cheapest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from llmtune.arms.results import Result
from llmtune.arms.scores import Gap, Mean, SeedVariance, gap, judge, mean
from llmtune.numbers import duration, size

NEAR = 1.1
"""A cost counts as higher than another one from ten percent on: a training's seconds vary by as much."""


@dataclass(frozen=True)
class Choice:
    """The arms of one size, best first, and which of them wins."""

    ranked: Sequence[Result]
    means: dict[str, Mean]
    gaps: dict[tuple[str, str], Gap]
    """The first minus the second, for each ordered pair of arms."""
    near: Sequence[Result]
    """The best arm, and those within one standard error of it."""
    winner: Result
    reason: str
    """Why it wins among them, in words; "" for the best arm of its own right."""

    def against(self, other: Result) -> Gap:
        """Return the winner minus another arm."""
        return self.gaps[self.winner.name, other.name]

    @property
    def others(self) -> list[Result]:
        """The arms that do not win, best first."""
        return [one for one in self.ranked if one is not self.winner]


def choose(arms: Sequence[Result], between: SeedVariance | None, higher_is_better: bool) -> Choice | None:
    """Rank the arms of one size and choose the winner; None where none has a score.

    All pairs count as looked at together, since the data say which arm is the best.
    """
    means = {one.name: mean(one.scores, between) for one in arms}
    sign = 1 if higher_is_better else -1
    known = [one for one in arms if means[one.name]["value"] is not None]
    ranked = sorted(known, key=lambda one: -sign * (means[one.name]["value"] or 0.0))
    if not ranked:
        return None
    pairs = {(a.name, b.name): gap(a.scores, b.scores, between) for a, b in combinations(ranked, 2)}
    judge(list(pairs.values()), higher_is_better)
    gaps = pairs | {(b, a): turned(one) for (a, b), one in pairs.items()}
    near = [one for one in ranked if one is ranked[0] or _is_near(gaps[ranked[0].name, one.name])]
    winner, reason = _cheapest(near)
    return Choice(ranked, means, gaps, near, winner, reason)


def turned(one: Gap) -> Gap:
    """Return a difference the other way round."""
    turns = {"better": "worse", "worse": "better"}
    value, bounds, words = one["difference"], one.get("interval"), one.get("verdict")
    turned: Gap = {**one, "difference": None if value is None else -value}
    if bounds:
        turned["interval"] = (-bounds[1], -bounds[0])
    if words:
        turned["verdict"] = turns.get(words, words)
    return turned


def _is_near(one: Gap) -> bool:
    """Whether two arms lie within one standard error, and the data do not tell them apart."""
    value, stderr = one["difference"], one["stderr"]
    if value is None or stderr is None:
        return False
    return abs(value) <= stderr and one.get("verdict") not in ("better", "worse")


def _cheapest(near: Sequence[Result]) -> tuple[Result, str]:
    """Return the arm that costs least, and by what: time, then memory, then the delta; else the best score."""
    left = list(near)
    for words, cost, form in _COSTS:
        costs = [cost(one) for one in left]
        known = sorted(value for value in costs if value is not None)
        if len(known) < len(costs):
            continue
        kept = [one for one, value in zip(left, costs, strict=True) if value is not None and value <= NEAR * known[0]]
        if len(kept) == 1 and len(left) > 1:
            return kept[0], f"{words} ({form(known[0])} against {form(known[1])})"
        left = kept
    return left[0], "has the best score" if len(near) > 1 else ""


_Cost = tuple[str, Callable[[Result], float | None], Callable[[float], str]]
_COSTS: tuple[_Cost, ...] = (
    ("trains in the least time", lambda one: one.seconds, duration),
    ("takes the least memory", lambda one: one.peak_bytes, size),
    ("has the smallest delta", lambda one: one.delta_bytes, size),
)
