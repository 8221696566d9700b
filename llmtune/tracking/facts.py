"""What trackers are told of a run beside its numbers: settings, plan, data, without a path of this machine."""

import json
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files import read_json
from llmtune.numbers import count
from llmtune.plan.table import PlanTable
from llmtune.recipe.compare import flatten
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import values
from llmtune.run import Run

_DATA = ("examples", "supervised_tokens", "prompt_tokens", "longest", "template_sha256")


def facts_of(run: Run) -> dict[str, Any]:
    """The recipe's keys, dotted; each stage of the plan in words; the counts of the data."""
    facts = _told(values(run.recipe()))
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
    return facts | _told({"data": {key: findings.get(key) for key in _DATA}})


def _told(value: object) -> dict[str, Any]:
    """Dotted keys and plain values of nested mappings, without those that are not set; a list is one text, as JSON."""
    told = {key: strip_paths(one) for key, one in flatten(value) if one is not None}
    return {key: json.dumps(one) if isinstance(one, list | tuple) else one for key, one in told.items()}
