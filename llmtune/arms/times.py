"""How soon an arm reached a validation loss, by its curve."""

from collections.abc import Sequence
from itertools import pairwise

from llmtune.arms.record import Point

SHARE = 0.9
"""Of the way from the start to the best loss of any arm."""


def seconds_to(curve: Sequence[Point], loss: float) -> float | None:
    """Return the training seconds at which a curve came down to a loss; None where it never did.

    Between two validations the loss is taken to fall evenly; what is below it at the first one counts from there.
    """
    if curve and curve[0]["loss"] <= loss:
        return curve[0]["seconds"]
    for before, after in pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def mean_seconds_to(curves: Sequence[Sequence[Point]], loss: float) -> float | None:
    """Return the mean of trainings' seconds to a loss; None where one of them never reached it."""
    reached = [seconds for curve in curves if (seconds := seconds_to(curve, loss)) is not None]
    return sum(reached) / len(reached) if reached and len(reached) == len(curves) else None


def best_loss(curves: Sequence[Sequence[Point]]) -> float | None:
    """Return the mean of the lowest loss of each training; None without validations."""
    lowest = [min(point["loss"] for point in curve) for curve in curves if curve]
    return sum(lowest) / len(lowest) if lowest else None


def seconds_of_best(curves: Sequence[Sequence[Point]]) -> float | None:
    """Return the mean of the seconds at which each training had its lowest loss; None without validations."""
    times = [min(curve, key=lambda point: point["loss"])["seconds"] for curve in curves if curve]
    return sum(times) / len(times) if times else None


def near_best(all_curves: Sequence[Sequence[Sequence[Point]]]) -> float | None:
    """Return the loss that is 90% of the way from the base's to the best of all arms; None without validations.

    The highest first validation stands for the base's loss.
    """
    bests = [best for curves in all_curves if (best := best_loss(curves)) is not None]
    firsts = [curve[0]["loss"] for curves in all_curves for curve in curves if curve]
    if not bests:
        return None
    first = max(firsts)
    return first - SHARE * (first - min(bests))
