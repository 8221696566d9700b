"""The tasks of a suite as lm-eval's own objects: by name, from a task file, or on local rows."""

from pathlib import Path
from typing import Any

import httpx2
import jinja2
import lm_eval.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml as load_task_yaml

import llmtune
from llmtune.errors import LlmtuneError, MachineError, nearest
from llmtune.evaluation.boundary import first_line, machine_lacks
from llmtune.evaluation.harness import quiet
from llmtune.recipe.located_yaml import Key
from llmtune.recipe.suite import HELD_OUT, LocalTask, Suite, local_rows, task_file
from llmtune.working import working

# lm-eval renders task files' templates outside a sandbox: a template could reach any Python object.
_sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_sandbox.filters.update(lm_eval.utils.env.filters)
lm_eval.utils.env = _sandbox


def load_tasks(suite: Suite) -> list[Task]:
    """Load a suite's lm-eval tasks and their rows; raises RecipeError for a bad file, MachineError if offline."""
    entries = [(index, entry) for index, entry in enumerate(suite.tasks) if entry != HELD_OUT]
    if not entries:
        return []
    by_name = any(isinstance(entry, LocalTask) or task_file(suite, entry) is None for _, entry in entries)
    with quiet(), working("loading tasks", len(entries), "tasks") as step:
        # The index of all of lm-eval's tasks takes some ten seconds.
        manager = TaskManager(include_defaults=by_name)
        tasks: list[Task] = []
        for index, entry in entries:
            tasks += _load(suite, index, entry, manager)
            step()
        return tasks


def _load(suite: Suite, index: int, entry: str | LocalTask, manager: TaskManager) -> list[Task]:
    key = ("tasks", index)
    name = entry.task if isinstance(entry, LocalTask) else entry
    file = None if isinstance(entry, LocalTask) else task_file(suite, entry)
    if file is None and name not in manager.all_tasks:
        raise suite.error(key, f"{name!r} is not a task of lm-eval{nearest(name, [HELD_OUT, *manager.all_tasks])}")
    try:
        spec: str | dict[str, Any] = name
        if isinstance(entry, LocalTask):
            spec = _on_local_rows(suite, index, entry, manager)
        elif file is not None:
            spec = _from_file(suite, index, file)
        loaded = manager.load([spec])
    except LlmtuneError:
        raise
    except Exception as error:
        raise _explained(suite, key, name, error) from error
    tasks = list(loaded["tasks"].values())
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        raise suite.error(key, f"{name} runs code that the model writes; llmtune does not")
    return tasks


def _explained(suite: Suite, key: Key, name: str, error: Exception) -> LlmtuneError:
    """Turn whatever kept lm-eval from loading a task into one line: what this machine lacks, or a wrong task."""
    if _is_offline(error):
        reason = f"{name} needs its rows from the Hub, which cannot be reached (offline?)"
        remedy = f"give a local file with {{task: {name}, rows: FILE}}, or set eval.suite: quick"
        return MachineError(str(suite.error(key, f"{reason}; {remedy}")))
    lack = machine_lacks(error)
    if lack:
        return MachineError(str(suite.error(key, f"lm-eval cannot load {name}: {lack}")))
    return suite.error(key, f"lm-eval cannot load {name}: {first_line(error)}")


def _is_offline(error: BaseException | None) -> bool:
    """Tell whether an error, or the one that it came from, means that the Hub cannot be reached."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | httpx2.TransportError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_local_rows(suite: Suite, index: int, entry: LocalTask, manager: TaskManager) -> dict[str, Any]:
    """Return the task's own configuration with the rows of its test split read from a local file."""
    file = manager.task_index[entry.task].yaml_path
    config = {} if file is None else load_task_yaml(file)
    split = config.get("test_split") or config.get("validation_split")
    if split is None:
        raise suite.error(("tasks", index, "task"), f"{entry.task!r} is a group of tasks; name one of them")
    rows = local_rows(suite, entry)
    reader = {".csv": "csv", ".parquet": "parquet"}.get(rows.suffix, "json")
    splits = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": split}
    source = {"dataset_path": reader, "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(rows)}}}
    return {**config, **splits, **source}


def _from_file(suite: Suite, index: int, file: Path) -> dict[str, Any]:
    """Return a task file's configuration with its includes; rows are looked up in this folder, then beside llmtune."""
    config: dict[str, Any] = load_task_yaml(file)
    if not isinstance(config.get("task"), str):
        raise suite.error(("tasks", index), f"{file} names no task (task: NAME)")
    for metric in config.get("metric_list") or []:
        if metric.get("metric") not in metric_registry:
            name = metric.get("metric")
            raise suite.error(
                ("tasks", index),
                f"{file}: metric {name!r} is not one of lm-eval's{nearest(str(name), [*metric_registry])}",
            )
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        beside = Path(llmtune.__file__).parents[1]
        located = {split: rows if Path(rows).is_file() else str(beside / rows) for split, rows in files.items()}
        missing = next((split for split, rows in located.items() if not Path(rows).is_file()), None)
        if missing is not None:
            raise suite.error(("tasks", index), f"{file}: no such file: {files[missing]}")
        config["dataset_kwargs"]["data_files"] = located
    return config
