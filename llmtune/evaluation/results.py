"""Stored evaluations: their shape, a table for people, and paired differences of comparable results."""

from typing import Any, NotRequired, TypedDict

from llmtune.errors import ProofError
from llmtune.evaluation.metrics import (
    Difference,
    Score,
    difference,
    format_difference,
    format_score,
    gaps,
    interval,
    spread,
    verdict,
)
from llmtune.files import read_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

FEW_SHOT = "held_out_few_shot"
TITLES = {"valid_json": "valid JSON", "exact_match": "exact match", "loss": "loss"}


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
    """Each metric that is a mean, row by row: None where it is not finite or a row has none."""
    higher_is_better: dict[str, bool]
    """By metric, where it is known."""
    resamples: dict[str, list[float | None]]
    """Each metric of all rows at once, such as perplexity, on rows drawn with replacement: the same for every model."""
    tokens: NotRequired[list[int]]
    """Answer tokens of each row: the weights of the loss."""
    outputs: NotRequired[list[str]]
    """What the model answered to each held-out row."""


class Answer(TypedDict):
    """A held-out row and what one model answered to it."""

    id: str
    question: str
    prompt: str
    answer: str
    output: str
    exact_match: bool
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
    mismatch = _first_mismatch(new["settings"], old["settings"])
    if mismatch:
        raise ProofError(f"results with different settings cannot be compared: {mismatch}")
    both = [task for task in new["results"] if task in old["results"]]
    return {task: compare_results(new["results"][task], old["results"][task]) for task in both}


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


def table(run: Run) -> list[dict[str, str]]:
    """Return a row of cells for each model, by column title: every score with its standard error and its n."""
    return compare_models(*(read_json(run.eval / f"{name}.json")["results"] for name in ("base", "tuned")))


def compare_models(base: dict[str, Result], tuned: dict[str, Result]) -> list[dict[str, str]]:
    """Return the cells of `table` for the results of two models by task."""
    tasks = [task for task in base if task not in (HELD_OUT, FEW_SHOT)]
    by_model = {"base, zero-shot": base, "tuned": tuned}
    if HELD_OUT not in base:
        return [{"model": model} | _task_cells(results, tasks) for model, results in by_model.items()]
    held_out = {"base, zero-shot": base[HELD_OUT]}
    if FEW_SHOT in base:
        held_out[f"base, {base[FEW_SHOT]['shots']}-shot"] = base[FEW_SHOT]
    held_out["tuned"] = tuned[HELD_OUT]
    return [
        {"model": model} | _held_out_cells(result) | _task_cells(by_model.get(model, {}), tasks)
        for model, result in held_out.items()
    ]


def base_note(run: Run) -> str | None:
    """Say over which base both models answered where that was not the whole one."""
    quantize = (read_json(run.eval / "tuned.json").get("settings") or {}).get("quantize") or "none"
    if quantize == "none":
        return None
    return f"Base and tuned model answered over the {quantize.replace('bit', '-bit')} base that was trained."


def difference_table(run: Run) -> list[dict[str, str]]:
    """Return a row of cells for each metric, by column title: tuned minus base, and whether that is better or worse."""
    stored: TunedEvaluation = read_json(run.eval / "tuned.json")
    shots = (stored["settings"].get("held_out") or {}).get("shots")
    names = {"base, few-shot": f"base, {shots}-shot"}
    return [
        {"tuned against": names.get(other, other), "metric": _metric_title(stored["results"][task], task, metric)}
        | _gap_cells(gap)
        for other, tasks in stored["differences"].items()
        for task, metrics in tasks.items()
        for metric, gap in metrics.items()
    ]


def _metric_title(result: Result, task: str, metric: str) -> str:
    """Name a metric for people, with its task and with which direction is better."""
    name = TITLES.get(metric, metric) if task == HELD_OUT else f"{task}: {metric}"
    return f"{name} (lower is better)" if result.get("higher_is_better", {}).get(metric) is False else name


def _gap_cells(gap: Difference) -> dict[str, str]:
    return {"difference": format_difference(gap), "verdict": gap.get("verdict", ""), "n": str(gap["n"])}


def task_title(task: str, result: Result) -> str:
    """Name a task for people: held-out rows by their number of shots, as zero-shot or 2-shot."""
    return {HELD_OUT: "zero-shot", FEW_SHOT: f"{result['shots']}-shot"}.get(task, task)


def _rows(result: Result) -> str:
    """Say how many rows were scored, and of how many if not all were."""
    return str(result["n"]) if result["n"] == result["of"] else f"{result['n']} of {result['of']}"


def _held_out_cells(result: Result) -> dict[str, str]:
    scores = {title: result["metrics"][metric] for metric, title in TITLES.items() if metric in result["metrics"]}
    return {**{title: format_score(one["value"], one["stderr"]) for title, one in scores.items()}, "n": _rows(result)}


def _task_cells(results: dict[str, Result], tasks: list[str]) -> dict[str, str]:
    """Return the first metric of each task with its n; a dash for a task that the model was not given."""
    return {task: _task_cell(results[task]) if task in results else "-" for task in tasks}


def _task_cell(result: Result) -> str:
    metric, score = next(iter(result["metrics"].items()))
    return f"{metric} {format_score(score['value'], score['stderr'])} (n {_rows(result)})"


def _first_mismatch(new: object, old: object, key: str = "") -> str | None:
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = ((name, new.get(name), old.get(name)) for name in {**new, **old})
        mismatches = (_first_mismatch(a, b, f"{key}.{name}" if key else name) for name, a, b in pairs)
        return next((mismatch for mismatch in mismatches if mismatch), None)
    return None if new == old else f"{key} is {new!r} in one and {old!r} in the other"
