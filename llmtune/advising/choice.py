"""One method recommended: by what was measured on like data, by the rules, and by time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtune.advising.recall import Remembered
from llmtune.advising.rules import Rule


@dataclass(frozen=True)
class Choice:
    """A method, and why it is recommended, in words with source and confidence."""

    arm: str
    reason: str


def choose(
    candidates: Sequence[str],
    rules: Sequence[Rule],
    before: Sequence[Remembered] = (),
    seconds: Mapping[str, float | None] | None = None,
) -> Choice | None:
    """The candidate that the rules prefer, then the quickest; of those that were measured before, among the best alone.

    None where there are no candidates. `rules` are those that hold.
    """
    if not candidates:
        return None
    measured = next(((one, left) for one in before if (left := [arm for arm in one.best if arm in candidates])), None)
    among = measured[1] if measured else candidates
    times = seconds or {}

    def order(arm: str) -> tuple[int, float]:
        return -points(rules, arm), times.get(arm) or 0.0

    arm = min(among, key=order)
    why = [f"{rule.advice} ({rule.source}; confidence {rule.confidence})" for rule in _speaking_for(rules, arm)[:1]]
    if measured:
        why = [measured[0].words, *why]
    return Choice(arm, "; ".join(why) or "of the methods that fit, no rule prefers another one")


def points(rules: Sequence[Rule], arm: str) -> int:
    """How strongly the rules that hold speak for a method."""
    return sum(rule.prefer for rule in rules if rule.about == arm)


def _speaking_for(rules: Sequence[Rule], arm: str) -> list[Rule]:
    """The rules for a method, the strongest first."""
    return sorted((rule for rule in rules if rule.about == arm and rule.prefer > 0), key=lambda rule: -rule.prefer)
