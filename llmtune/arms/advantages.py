"""What the training of a pretrained model gains: over one from random weights, over no training, and in time."""

from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict

from llmtune.arms.results import Result, at_size
from llmtune.arms.scores import Gap, SeedVariance, gap, judge
from llmtune.arms.sentences import change_words
from llmtune.arms.times import best_loss, mean_seconds_to, seconds_of_best
from llmtune.numbers import duration

SCRATCH = "scratch"
UNTRAINED = ("zero-shot", "few-shot")


class Compared(Gap):
    """An arm minus something else, at a size."""

    arm: str
    to: str
    size: float


class Advantage(TypedDict):
    """An advantage in words, with the differences that show it."""

    words: str
    measured: bool
    gaps: NotRequired[list[Compared]]
    seconds: NotRequired[dict[str, float | None]]
    """Training seconds to the best validation loss of scratch: `tuned`, `scratch`."""


def advantages(
    winner: Result, arms: Sequence[Result], baselines: Sequence[Result], between: SeedVariance | None, higher: bool
) -> dict[str, Advantage]:
    """Return the three advantages by name: transfer, better, quicker."""
    return {
        "transfer": _transfer(winner, arms, baselines, between, higher),
        "better": _better(winner, baselines, between, higher),
        "quicker": _quicker(winner, baselines),
    }


def _transfer(
    winner: Result, arms: Sequence[Result], baselines: Sequence[Result], between: SeedVariance | None, higher: bool
) -> Advantage:
    """Tuned minus scratch at each size at which both were trained."""
    pairs = [
        (tuned, scratch)
        for scratch in sorted(baselines, key=lambda one: -one.size)
        for tuned in at_size(arms, scratch.size)
        if scratch.name == SCRATCH and tuned.name == winner.name
    ]
    if not pairs:
        return _unknown("the same model from random weights was not trained; add scratch to --baselines")
    gaps = _judged(pairs, between, higher)
    told = "; ".join(f"{_words(one)} with {_share(one['size'])}" for one in gaps)
    return {"words": f"{winner.name} minus the same model from random weights: {told}", "measured": True, "gaps": gaps}


def _better(winner: Result, baselines: Sequence[Result], between: SeedVariance | None, higher: bool) -> Advantage:
    """The winner minus the base without training, zero-shot and few-shot."""
    pairs = [(winner, one) for name in UNTRAINED for one in baselines if one.name == name]
    if not pairs:
        return _unknown("the base was not asked without training; add zero-shot to --baselines")
    gaps = _judged(pairs, between, higher)
    told = "; ".join(f"{_words(one)} to {one['to']}" for one in gaps)
    return {"words": f"{winner.name} minus the base without training: {told}", "measured": True, "gaps": gaps}


def _quicker(winner: Result, baselines: Sequence[Result]) -> Advantage:
    """How soon the winner reaches the best validation loss of a training from random weights."""
    scratch = next((one for one in at_size(baselines, winner.size) if one.name == SCRATCH), None)
    target = best_loss(scratch.curves) if scratch else None
    if scratch is None or target is None:
        return _unknown("the same model from random weights was not trained; add scratch to --baselines")
    tuned, other = mean_seconds_to(winner.curves, target), seconds_of_best(scratch.curves)
    seconds = {"tuned": tuned, SCRATCH: other}
    if tuned is None:
        words = f"{winner.name} never reached the best validation loss of scratch, {target:.3f}"
        return {"words": words, "measured": True, "seconds": seconds}
    took = f" against {duration(other)}" if other is not None else ""
    times = f", {other / tuned:.1f} times as fast" if other and tuned and other > tuned else ""
    words = (
        f"{winner.name} reached the best validation loss of scratch ({target:.3f}) in {duration(tuned)}{took}{times}"
    )
    return {"words": words, "measured": True, "seconds": seconds}


def _unknown(why: str) -> Advantage:
    return {"words": f"not measured: {why}", "measured": False}


def _judged(pairs: Sequence[tuple[Result, Result]], between: SeedVariance | None, higher: bool) -> list[Compared]:
    """Return the differences of pairs of arms, judged together."""
    gaps: list[Gap] = [gap(one.scores, other.scores, between) for one, other in pairs]
    judge(gaps, higher)
    return [
        {**known, "arm": one.name, "to": other.name, "size": one.size}
        for known, (one, other) in zip(gaps, pairs, strict=True)
    ]


def _words(one: Compared) -> str:
    """Say a difference with its error, and that it is none where that was not measured."""
    words = one["verdict"] if one["verdict"] not in ("better", "worse") else ""
    return change_words(one) + (f" ({words})" if words else "")


def _share(size: float) -> str:
    return "all rows" if size == 1 else f"{size:.0%} of the rows"
