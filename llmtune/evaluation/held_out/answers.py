"""Metrics of answers that a model writes: each scores one answer, and says how rows become a number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from lm_eval.api.metrics import mean

from llmtune.errors import FieldError
from llmtune.evaluation.aggregates import Aggregation, OfSums
from llmtune.evaluation.held_out.choice import CHRF, EXACT_MATCH, JSON, KEY, REGEX, ROUGE, matches, slow_words
from llmtune.evaluation.held_out.fields import Kind, parsed, score_fields
from llmtune.evaluation.held_out.truth import Truth, same
from llmtune.evaluation.metrics import Array

ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Scorer:
    """One name of eval.metrics: the metrics that it gives, and how an answer is scored."""

    aggregations: dict[str, Aggregation]
    """By metric, in the order in which they are shown."""
    score: Callable[[str, Truth, Kind], dict[str, Any]]
    """Takes what is compared of an answer, the true answer and how they are compared; gives an item by metric."""


def scorer(name: str) -> Scorer | None:
    """Return what scores answers for a name of eval.metrics; None where the model is asked something else."""
    if name.startswith(REGEX):
        return Scorer({name: mean}, lambda answer, truth, kind: {name: _match(name, answer)})
    makers = {EXACT_MATCH: _exact_match, JSON: _json, ROUGE: _rouge, CHRF: _chrf}
    return makers[name]() if name in makers else None


def _exact_match() -> Scorer:
    return Scorer(
        {EXACT_MATCH: mean}, lambda answer, truth, kind: {EXACT_MATCH: float(same(answer, truth.final, kind))}
    )


def _json() -> Scorer:
    def score(answer: str, truth: Truth, kind: Kind) -> dict[str, Any]:
        valid = float(parsed(answer) is not None)
        return {"valid_json": valid, "field_f1": score_fields(answer, truth.final).f1}

    return Scorer({"valid_json": mean, "field_f1": mean}, score)


def _rouge() -> Scorer:
    from rouge_score.rouge_scorer import RougeScorer

    library = RougeScorer(list(ROUGES))

    def score(answer: str, truth: Truth, kind: Kind) -> dict[str, Any]:
        return {name: float(one.fmeasure) for name, one in library.score(truth.final, answer).items()}

    return Scorer(dict.fromkeys(ROUGES, mean), score)


def _chrf() -> Scorer:
    from sacrebleu.metrics import chrf

    library = chrf.CHRF()

    def values(sums: Array) -> Array:
        return numpy.array([library._compute_score_from_stats(row).score for row in sums.tolist()])

    def score(answer: str, truth: Truth, kind: Kind) -> dict[str, Any]:
        (counts,) = library._extract_corpus_statistics([answer.strip()], [[truth.final.strip()]])
        return {CHRF: tuple(counts)}

    return Scorer({CHRF: OfSums(values)}, score)


def _match(name: str, answer: str) -> float:
    """Return 1.0 for an answer with a match; raises FieldError where that takes too long."""
    result = matches(name, answer.strip())
    if result is None:
        raise FieldError(KEY, slow_words(name))
    return float(result)
