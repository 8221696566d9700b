"""A group's scores from those of its tasks, by lm-eval's own aggregation."""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.group import Group

from llmtune.evaluation.metrics import finite
from llmtune.evaluation.results import Result


def group_result(group: Group, results: Mapping[str, Result]) -> Result:
    """Aggregate one model's results on a group's tasks as lm-eval does, with the row scores that differences need."""
    members = [results[task.task_name] for task in group.get_all_tasks()]
    values: dict[str, Any] = dict(group.aggregate({name: _as_lm_eval(one) for name, one in results.items()}))
    weighted = {one.metric: one.weight_by_size for one in group.aggregate_metric_list or []}
    total: Result = {
        "shots": max(one["shots"] for one in members),
        "n": sum(one["n"] for one in members),
        "of": sum(one["of"] for one in members),
        "limit": members[0]["limit"],
        "version": group.version,
        "truncated": sum(one["truncated"] for one in members),
        "not_finite": sum(one["not_finite"] for one in members),
        "metrics": {},
        "scores": {},
        "higher_is_better": {},
        "resamples": {},
    }
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        title = metric if kind == "none" else f"{metric}:{kind}"
        stderr = values.get(f"{metric}_stderr,{kind}")
        error = finite(stderr) if isinstance(stderr, int | float) else None
        total["metrics"][title] = {"value": finite(value), "stderr": error, "n": total["n"]}
        scores = _row_scores(members, title, weighted[metric])
        if scores is not None:
            total["scores"][title] = scores
        if title in members[0]["higher_is_better"]:
            total["higher_is_better"][title] = members[0]["higher_is_better"][title]
    return total


def _as_lm_eval(result: Result) -> dict[str, Any]:
    """Return a task's scores under the keys that lm-eval's aggregation reads."""
    keyed: dict[str, Any] = {"sample_len": result["n"]}
    for title, score in result["metrics"].items():
        metric, _, kind = title.partition(":")
        keyed[f"{metric},{kind or 'none'}"] = float("nan") if score["value"] is None else score["value"]
        keyed[f"{metric}_stderr,{kind or 'none'}"] = "N/A" if score["stderr"] is None else score["stderr"]
    return keyed


def _row_scores(members: list[Result], title: str, by_size: bool) -> list[float | None] | None:
    """Return the rows of all tasks, whose mean is the group's value; None where a task has no row scores."""
    if any(title not in one["scores"] for one in members):
        return None
    rows = sum(len(one["scores"][title]) for one in members)
    joined: list[float | None] = []
    for one in members:
        scores = one["scores"][title]
        share = 1.0 if by_size else rows / (len(members) * len(scores))
        joined += [None if score is None else score * share for score in scores]
    return joined
