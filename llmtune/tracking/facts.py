"""What trackers are told of a run beside its numbers: settings, plan, data, without a path of this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files import read_json
from llmtune.numbers import count
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import values
from llmtune.run import Run

_DATA = ("examples", "supervised_tokens", "prompt_tokens", "longest", "template_sha256")


def facts_of(run: Run) -> dict[str, Any]:
    """The recipe's keys, dotted; each stage of the plan in words; the counts of the data."""
    facts = dict(_flatten(values(run.recipe())))
    try:
        plan = PlanTable.read(run.plan_file)
        findings = read_json(run.data_file)
    except LlmtuneError:
        return facts
    facts |= {"plan.method": plan.in_words or plan.method, "plan.steps": plan.steps, "plan.blocks": plan.blocks}
    facts |= {"plan.parameters": plan.parameters, "plan.trained": plan.trained}
    for number, stage in enumerate(plan.stages, 1):
        distances = f"distances {stage.distances_in_words} at {stage.rates_in_words}"
        facts[f"plan.stage_{number}"] = f"steps {stage.steps_in_words}: {count(stage.trained)} parameters, {distances}"
    return facts | dict(_flatten({"data": {key: findings.get(key) for key in _DATA}}))


def _flatten(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield dotted keys and plain values of nested mappings; a list is one value, as JSON."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif value is not None:
        yield key, json.dumps(_without_paths(value)) if isinstance(value, list | tuple) else _without_paths(value)


def _without_paths(value: Any) -> Any:
    """A value with the last name of an absolute path in place of it, at any depth."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
