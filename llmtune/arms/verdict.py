"""What the numbers of a comparison say: who wins and why, what training gains, and what was not measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired

from typing_extensions import TypedDict

from llmtune.arms.advantages import Advantage, advantages
from llmtune.arms.choice import Choice, choose
from llmtune.arms.record import ArmRecord, Comparison
from llmtune.arms.results import Result, arm_results, at_size, baseline_results, titled
from llmtune.arms.scores import Gap, Mean, SeedVariance, gap, judge, mean, seed_variance
from llmtune.arms.sentences import no_winner, three_sentences
from llmtune.arms.times import mean_seconds_to, near_best


class Numbers(TypedDict):
    """What an arm or a baseline reached and took at a size."""

    name: str
    size: float
    is_arm: bool
    score: Mean
    loss: Mean | None
    seconds: float | None
    peak_bytes: int | None
    delta_bytes: int | None
    seconds_to_90: float | None
    gap: NotRequired[Gap]
    """An arm minus the winner, or a baseline minus the best arm, at the winner's size."""


class Verdict(TypedDict):
    """What the numbers of a comparison say."""

    winner: str | None
    """A name; None where no arm has a score."""
    size: NotRequired[float]
    """The share of the training rows at which it wins."""
    sentences: list[str]
    ranking: list[str]
    results: list[Numbers]
    advantages: dict[str, Advantage]
    notes: list[str]


@dataclass(frozen=True)
class _Errors:
    """Variances between seeds by size, pooled over the arms of each: of scores, and of losses."""

    scores: dict[float, SeedVariance | None]
    losses: dict[float, SeedVariance | None]


def conclude(comparison: Comparison) -> Verdict:
    """Return what a comparison says, as values of JSON."""
    arms, baselines, higher = arm_results(comparison), baseline_results(comparison), comparison["higher_is_better"]
    size = max((one.size for one in arms), default=1.0)
    errors = _errors(arms)
    between = errors.scores.get(size)
    choice = choose(at_size(arms, size), between, higher)
    if choice is None:
        sentences = no_winner(comparison)
        return {"winner": None, "sentences": sentences, "ranking": [], "results": [], "advantages": {}, "notes": []}
    against = _baseline_gaps(choice, at_size(baselines, size), between, higher)
    return {
        "winner": choice.winner.name,
        "size": size,
        "sentences": three_sentences(comparison, choice, against),
        "ranking": [one.name for one in choice.ranked],
        "results": _results(choice, arms, baselines, errors, against),
        "advantages": advantages(choice.winner, arms, baselines, between, higher),
        "notes": list(_notes(comparison, choice, between)),
    }


def _errors(arms: Sequence[Result]) -> _Errors:
    by_size = {one.size: at_size(arms, one.size) for one in arms}
    scores = {size: seed_variance([one.scores for one in some]) for size, some in by_size.items()}
    losses = {size: seed_variance([one.losses for one in some if one.losses]) for size, some in by_size.items()}
    return _Errors(scores, losses)


def _baseline_gaps(
    choice: Choice, baselines: Sequence[Result], between: SeedVariance | None, higher: bool
) -> dict[str, Gap]:
    """Return each baseline minus the arm with the best score, by the baseline's name."""
    gaps = {one.name: gap(one.scores, choice.ranked[0].scores, between) for one in baselines}
    judge(list(gaps.values()), higher)
    return gaps


def _results(
    choice: Choice, arms: Sequence[Result], baselines: Sequence[Result], errors: _Errors, against: dict[str, Gap]
) -> list[Numbers]:
    """Return the numbers of every arm and baseline: those of the winner's size first, best first."""
    place = {one.name: number for number, one in enumerate(choice.ranked)}
    ordered = sorted(arms, key=lambda one: (-one.size, place.get(one.name, len(place))))
    curves = {one.size: [arm.curves for arm in at_size(arms, one.size)] for one in arms}
    targets = {size: near_best(some) for size, some in curves.items()}
    listed: list[Numbers] = []
    for one in (*ordered, *baselines):
        numbers, compared = _numbers(one, errors, targets.get(one.size)), _gap_shown(choice, one, against)
        listed.append({**numbers, "gap": compared} if compared else numbers)
    return listed


def _gap_shown(choice: Choice, one: Result, against: dict[str, Gap]) -> Gap | None:
    """Return an arm minus the winner, or a baseline minus the best arm; None at other sizes."""
    if one.size != choice.winner.size:
        return None
    return choice.gaps.get((one.name, choice.winner.name)) if one.is_arm else against.get(one.name)


def _numbers(one: Result, errors: _Errors, target: float | None) -> Numbers:
    reached = mean_seconds_to(one.curves, target) if target is not None else None
    return {
        "name": one.name,
        "size": one.size,
        "is_arm": one.is_arm,
        "score": mean(one.scores, errors.scores.get(one.size)),
        "loss": mean(one.losses, errors.losses.get(one.size)) if one.losses else None,
        "seconds": one.seconds,
        "peak_bytes": one.peak_bytes,
        "delta_bytes": one.delta_bytes,
        "seconds_to_90": reached,
    }


def _notes(comparison: Comparison, choice: Choice, between: SeedVariance | None) -> Iterator[str]:
    """Say what a reader should know of how the numbers came about."""
    winner = choice.winner
    if between is None:
        yield (
            "One seed an arm: how much a training varies by its seed was not measured, so errors count rows alone; "
            "add --seeds 2"
        )
    record = next(arm for arm in comparison["arms"] if (arm["name"], arm["size"]) == (winner.name, winner.size))
    if len(record.get("search", [])) < 2:
        yield f"{winner.name} trained at its default rate: its share had no time to search for a better one"
    elif edge := edge_of_search(record):
        yield f"The best rate of {winner.name} lies at the {edge} end of those tried; one beyond may be better"
    pairs = len(choice.ranked) * (len(choice.ranked) - 1) // 2
    if pairs > 1:
        yield f"{pairs} pairs of arms were compared; their p-values are corrected for that (Holm)"
    yield from _not_compared(comparison)


def _not_compared(comparison: Comparison) -> Iterator[str]:
    for status in ("failed", "skipped"):
        named = [titled(one["name"], one["size"]) for one in comparison["arms"] if one["status"] == status]
        if named:
            yield f"{status}: {', '.join(named)}"
    for one in comparison["arms"]:
        if one["status"] == "done" and "limited" in one:
            yield f"{titled(one['name'], one['size'])} ended before its minutes were over: {one['limited']}"
    asked = len(comparison["seeds"])
    short = [
        titled(one["name"], one["size"])
        for one in comparison["arms"]
        if one["status"] == "done" and len(one.get("seeds", [])) < asked
    ]
    if short:
        yield f"fewer than {asked} seeds: {', '.join(short)}"


def edge_of_search(arm: ArmRecord) -> str | None:
    """Return which end of the rates that were tried gave the lowest loss: lower or upper; None for one between."""
    tries = arm.get("search", [])
    complete = [one for one in tries if one["state"] == "complete" and one["loss"] is not None]
    factors = sorted({one["factor"] for one in tries})
    if not complete or len(factors) < 2:
        return None
    best = min(complete, key=lambda one: one["loss"] or 0.0)["factor"]
    return "lower" if best == factors[0] else "upper" if best == factors[-1] else None
