"""The loss of held-out rows by token, and the perplexity that follows from it."""

import math
from collections.abc import Sequence

import numpy

from llmtune.evaluation.held_out.choice import PERPLEXITY
from llmtune.evaluation.metrics import Score, finite, resampled_ratios, score, with_interval
from llmtune.evaluation.results import Result

LOSS = "loss"
_LARGEST = math.log(numpy.finfo(float).max)


def add_losses(result: Result, losses: Sequence[float | None], tokens: list[int], with_perplexity: bool = True) -> None:
    """Add the summed losses of rows, in nats, None where not finite, and how many tokens each is of."""
    known = [math.nan if loss is None else loss for loss in losses] if any(tokens) else []
    result["metrics"][LOSS] = loss = score(known, tokens)
    result["scores"][LOSS], result["tokens"] = list(losses), tokens
    result["not_finite"] = sum(value is None for value in losses)
    result["higher_is_better"][LOSS] = False
    if with_perplexity:
        resampled = resampled_ratios(known, tokens) if loss["value"] is not None else []
        result["resamples"][PERPLEXITY] = exponents = [_exponential(value) for value in resampled]
        result["metrics"][PERPLEXITY] = with_interval(_perplexity(loss), exponents)
        result["higher_is_better"][PERPLEXITY] = False


def _exponential(value: float | None) -> float | None:
    return None if value is None or value >= _LARGEST else finite(math.exp(value))


def _perplexity(loss: Score) -> Score:
    """Return e to the loss, and its standard error to the first order; None where it is too large for a number."""
    value, error = _exponential(loss["value"]), loss["stderr"]
    stderr = None if value is None or error is None else finite(value * error)
    return {"value": value, "stderr": stderr, "n": loss["n"]}
