"""The tuned model's scores in the Hub's model-index form: every metric with its data set, its n and its error."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from llmtune.data.sources import HubName
from llmtune.data.sources.files import reader_of
from llmtune.evaluation.results import FEW_SHOT, GENERAL_QUESTIONS, GENERAL_TEXTS, TEXTS
from llmtune.files import read_json
from llmtune.recipe.paths import exists
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

_HELD_OUT = {HELD_OUT: "held-out rows", FEW_SHOT: "held-out rows", TEXTS: "held-out texts"}
_NAMES = {**_HELD_OUT, GENERAL_QUESTIONS: "llmtune's general questions", GENERAL_TEXTS: "llmtune's general texts"}


def scores(run: Run, settings: Recipe) -> list[EvalResult]:
    """Return the tuned model's scores, without the tasks of a group; empty for a run that was not evaluated."""
    if not run.done("eval"):
        return []
    results = read_json(run.eval / "tuned.json")["results"]
    return [
        score
        for task, result in results.items()
        if "group" not in result
        for score in _task_scores(task, result, settings)
    ]


def _task_scores(task: str, result: Mapping[str, Any], settings: Recipe) -> Iterator[EvalResult]:
    rows = {"num_few_shot": result.get("shots"), "n": result.get("n"), "of": result.get("of")}
    version = str(result["version"]) if result.get("version") is not None and task not in _HELD_OUT else None
    for metric, score in result.get("metrics", {}).items():
        if not isinstance(score.get("value"), int | float):
            continue
        error = {key: score[key] for key in ("stderr", "interval", "n") if score.get(key) is not None}
        yield EvalResult(
            task_type="text-generation",
            **_dataset(task, settings),
            dataset_args=_set({**rows, "version": version}) or None,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=score["value"],
            metric_args=error or None,
        )


def _dataset(task: str, settings: Recipe) -> dict[str, Any]:
    """What names a task's data set: held-out rows by the Hub data set that they are, where they are one."""
    held_out = [part.source for part in settings.data.sources("test") or settings.data.sources("eval")]
    hub = hub_name(held_out[0]) if task == HELD_OUT and len(held_out) == 1 else None
    own = {"dataset_type": task.replace("_", "-"), "dataset_name": _NAMES.get(task, task)}
    if hub is None:
        return own
    # A single word after the name may be a configuration.
    split = hub.split if hub.configuration or hub.split in ("train", "validation", "test") else None
    named = {"dataset_type": hub.name, "dataset_config": hub.configuration, "dataset_split": split}
    return {**own, **_set(named)}


def hub_name(source: str) -> HubName | None:
    """Take the name of a Hub data set apart; None for a file or folder, even one that is gone."""
    hub = None if exists(source) else HubName.parse(source)
    return None if hub is None or exists(hub.name) or reader_of(hub.name) else hub


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None."""
    return {key: value for key, value in values.items() if value is not None}
