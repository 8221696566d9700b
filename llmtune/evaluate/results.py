"""Stored evaluations: a table for people, and paired differences of results that were made alike."""

from typing import Any

from llmtune.errors import ProofError
from llmtune.evaluate.metrics import Score, difference, format_score
from llmtune.files import read_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

Result = dict[str, Any]

FEW_SHOT = "held_out_few_shot"
TITLES = {"valid_json": "valid JSON", "exact_match": "exact match", "loss": "loss"}


def compare(new: Result, old: Result) -> dict[str, dict[str, Score]]:
    """`new` minus `old` by task and metric, paired by row; raises ProofError where their settings differ."""
    odd = _first_difference(new["settings"], old["settings"])
    if odd:
        raise ProofError(f"results with different settings cannot be compared: {odd}")
    both = [name for name in new["results"] if name in old["results"]]
    return {name: paired(new["results"][name], old["results"][name]) for name in both}


def paired(new: Result, old: Result) -> dict[str, Score]:
    """`new` minus `old` by metric, for two results on the same rows."""
    both = [metric for metric in new["scores"] if metric in old["scores"]]
    weights = {"loss": new.get("tokens")}
    return {
        metric: difference(new["scores"][metric], old["scores"][metric], weights.get(metric))
        for metric in both
        if len(new["scores"][metric]) == len(old["scores"][metric])
    }


def table(run: Run) -> list[dict[str, str]]:
    """What was measured, a row a model: each number with its standard error, and how many rows it is of."""
    base, tuned = (read_json(run.eval / f"{name}.json")["results"] for name in ("base", "tuned"))
    tasks = [name for name in base if name not in (HELD_OUT, FEW_SHOT)]
    lines = {"base, zero-shot": base, "tuned": tuned}
    if HELD_OUT not in base:
        return [{"model": name} | _task_cells(results, tasks) for name, results in lines.items()]
    held = {"base, zero-shot": base[HELD_OUT], "tuned": tuned[HELD_OUT]}
    if FEW_SHOT in base:
        few = f"base, {base[FEW_SHOT]['shots']}-shot"
        held = {"base, zero-shot": base[HELD_OUT], few: base[FEW_SHOT], "tuned": tuned[HELD_OUT]}
    return [
        {"model": name} | _held_cells(found) | _task_cells(lines.get(name, {}), tasks) for name, found in held.items()
    ]


def count(found: Result) -> str:
    """How many rows a result is of, and of how many there are where not all were asked."""
    return str(found["n"]) if found["n"] == found["of"] else f"{found['n']} of {found['of']}"


def _held_cells(found: Result) -> dict[str, str]:
    cells = {title: format_score(found["metrics"][key]) for key, title in TITLES.items() if key in found["metrics"]}
    return {**cells, "n": count(found)}


def _task_cells(results: Result, tasks: list[str]) -> dict[str, str]:
    """The first metric of each task with its n; a dash for a model that was not asked."""
    cells = {}
    for name in tasks:
        found = results.get(name)
        metric = next(iter(found["metrics"])) if found else ""
        cells[name] = f"{metric} {format_score(found['metrics'][metric])} (n {count(found)})" if found else "-"
    return cells


def _first_difference(new: Any, old: Any, key: str = "") -> str | None:
    if isinstance(new, dict) and isinstance(old, dict):
        pairs = ((name, new.get(name), old.get(name)) for name in {**new, **old})
        found = (_first_difference(a, b, f"{key}.{name}" if key else name) for name, a, b in pairs)
        return next((one for one in found if one), None)
    return None if new == old else f"{key} is {new!r} in one and {old!r} in the other"
