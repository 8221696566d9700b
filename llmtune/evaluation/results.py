"""Stored evaluations: their shape, and paired differences of comparable results."""

from typing import Any, NotRequired, TypedDict

from llmtune.errors import ProofError
from llmtune.evaluation.metrics import (
    Difference,
    Score,
    difference,
    gaps,
    interval,
    spread,
    verdict,
)
from llmtune.files import read_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

FEW_SHOT = "held_out_few_shot"
TEXTS = "held_out_texts"
"""The task of held-out rows that are plain texts, where others are questions."""
GENERAL_QUESTIONS, GENERAL_TEXTS = "general_questions", "general_texts"
"""What shows the cost of a training: the fixed questions and texts of eval/general."""
GENERAL_PART = "general questions and texts"
"""The part of an evaluation that asks both."""
OWN_NAMES = (HELD_OUT, FEW_SHOT, TEXTS, GENERAL_QUESTIONS, GENERAL_TEXTS, GENERAL_PART)
"""What llmtune calls its own parts and their results: no task of a suite may have such a name."""
TEXTS_COMPARED = "every token of plain texts"
"""What `compared` says of them."""


class Result(TypedDict):
    """One model's scores on one task."""

    shots: int
    n: int
    """Rows that were scored."""
    of: int
    """Rows that the task has."""
    limit: int | None
    version: float | str
    truncated: int
    """Requests that were longer than the model's context and lost their start."""
    not_finite: int
    """Requests whose log-likelihood was not a finite number."""
    metrics: dict[str, Score]
    scores: dict[str, list[float | None]]
    """Each metric that is a mean, row by row: None where it is not finite or a row has none. The loss is the nats of
    all of a row's answer tokens."""
    higher_is_better: dict[str, bool]
    """By metric, where it is known."""
    resamples: dict[str, list[float | None]]
    """Each metric of all rows at once, such as perplexity, on rows drawn with replacement: the same for every model."""
    batch_rows: NotRequired[dict[str, int]]
    """Rows at the most that went through the model at one time, for its answers and for its losses: batches follow what
    memory is free, and in 16 bits other batches round otherwise."""
    tokens: NotRequired[list[int]]
    """Answer tokens of each row: the weights of the loss."""
    compared: NotRequired[str]
    """What the metrics of held-out rows compare, in words."""
    group: NotRequired[str]
    """The group that a task belongs to, whose score stands for those of its tasks."""
    outputs: NotRequired[list[str]]
    """What the model answered to each held-out row."""


class Answer(TypedDict):
    """A held-out row and what one model answered to it."""

    id: str
    question: str
    prompt: str
    answer: str
    output: str
    kind: NotRequired[str]
    """text for a plain text, whose start stands as the question, and which has no answer."""
    scores: NotRequired[dict[str, float]]
    """Each metric of rows other than exact match and valid JSON."""
    label: NotRequired[str | None]
    """The likeliest of the labels; None where none has a finite likelihood."""
    exact_match: NotRequired[bool]
    valid_json: NotRequired[bool]
    loss: float | None
    """Nats per answer token; None where it is not a finite number."""


Differences = dict[str, dict[str, Difference]]
"""By task and metric."""


class Answers(TypedDict):
    """One model's results by task, and its answers to the held-out rows."""

    results: dict[str, Result]
    rows: list[Answer]
    few_shot_rows: NotRequired[list[Answer]]


class Evaluation(Answers):
    """What eval/base.json holds: one model's answers, and everything that decides them."""

    model: str
    base: dict[str, Any]
    delta: dict[str, str] | None
    """SHA-256 of each file of the delta."""
    settings: dict[str, Any]
    unasked: NotRequired[str]
    """Why the base was not asked, where there are no answers."""


class TunedEvaluation(Evaluation):
    """What eval/tuned.json holds."""

    differences: dict[str, Differences]
    """The tuned model minus the base, by how the base was asked."""


class Evaluations(TypedDict):
    """What `evaluate` returns and eval/ holds."""

    base: Evaluation
    tuned: TunedEvaluation
    settings: dict[str, Any]


def differences(tuned: Evaluation, base: Evaluation) -> dict[str, Differences]:
    """Return the tuned model minus the base by task and metric, zero-shot and, on held-out rows, few-shot."""
    by_base = {"base, zero-shot": compare(tuned, base)}
    if FEW_SHOT in base["results"]:
        by_base["base, few-shot"] = {HELD_OUT: compare_results(tuned["results"][HELD_OUT], base["results"][FEW_SHOT])}
    return by_base


def compare(new: Evaluation, old: Evaluation) -> Differences:
    """Return `new` minus `old`, paired by row; raises ProofError for evaluations under different settings."""
    require_same_settings(new["settings"], old["settings"])
    both = [task for task in new["results"] if task in old["results"]]
    return {task: compare_results(new["results"][task], old["results"][task]) for task in both}


def require_same_settings(new: object, old: object, where: str = "") -> None:
    """Raise ProofError, naming the first setting that differs, for settings whose results cannot be compared.

    Results that hold no settings are taken as they are.
    """
    mismatch = None if new is None or old is None else _first_mismatch(new, old)
    if mismatch:
        raise ProofError(f"{where}results with different settings cannot be compared: {mismatch}")


def read_evaluation(run: Run) -> tuple[Evaluation, TunedEvaluation]:
    """Read what eval/ holds of base and tuned model; raises ProofError for results under different settings."""
    base, tuned = (read_json(run.eval / f"{name}.json") for name in ("base", "tuned"))
    require_same_settings(tuned.get("settings"), base.get("settings"), f"{run.eval}: ")
    return base, tuned


def compare_results(new: Result, old: Result) -> dict[str, Difference]:
    """Return `new` minus `old` by metric, for two results on the same rows."""
    both = {metric: _difference(new, old, metric) for metric in new["metrics"] if metric in old["metrics"]}
    return {
        metric: {**gap, "verdict": verdict(gap, new["higher_is_better"].get(metric))}
        for metric, gap in both.items()
        if gap is not None
    }


def _difference(new: Result, old: Result, metric: str) -> Difference | None:
    """Return the difference of one metric; None for results on different rows."""
    after, before = new["metrics"][metric], old["metrics"][metric]
    if after["value"] is None or before["value"] is None:
        return {"difference": None, "stderr": None, "n": after["n"]}
    if metric not in (*new["scores"], *new["resamples"]):
        return None  # follows from another metric, as perplexity from the loss
    if metric in new["resamples"]:
        return _difference_of_aggregates(new, old, metric, after["value"] - before["value"])
    scores, others = new["scores"][metric], old["scores"].get(metric, [])
    if len(scores) != len(others):
        return None
    weights = new.get("tokens") if metric == "loss" else None
    pairs = [
        (a, b, weight)
        for a, b, weight in zip(scores, others, weights or [1] * len(scores), strict=True)
        if a is not None and b is not None
    ]
    if not pairs:
        return None
    return difference([a for a, _, _ in pairs], [b for _, b, _ in pairs], [weight for _, _, weight in pairs])


def _difference_of_aggregates(new: Result, old: Result, metric: str, change: float) -> Difference | None:
    if (new["n"], new["metrics"][metric]["n"]) != (old["n"], old["metrics"][metric]["n"]):
        return None
    resampled = gaps(new["resamples"][metric], old["resamples"].get(metric, []))
    result: Difference = {"difference": change, "stderr": spread(resampled), "n": new["metrics"][metric]["n"]}
    bounds = interval(resampled)
    return {**result, "interval": bounds} if bounds else result


def _first_mismatch(new: object, old: object, key: str = "") -> str | None:
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = ((name, new.get(name), old.get(name)) for name in {**new, **old})
        mismatches = (_first_mismatch(a, b, f"{key}.{name}" if key else name) for name, a, b in pairs)
        return next((mismatch for mismatch in mismatches if mismatch), None)
    return None if new == old else f"{key} is {new!r} in one and {old!r} in the other"
