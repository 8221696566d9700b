"""The tasks of a suite as lm-eval's own objects: by name, from a task file, or on local rows."""

import importlib.metadata
from pathlib import Path
from typing import Any

import httpx2
import jinja2
import lm_eval.utils
from datasets.exceptions import DatasetsError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml as load_task_yaml

import llmtune
from llmtune.errors import LlmtuneError, MachineError, nearest
from llmtune.evaluation.boundary import kind_and_line, machine_lacks
from llmtune.evaluation.groups.members import local_group, member_names
from llmtune.evaluation.harness import quiet, rehearse
from llmtune.evaluation.results import OWN_NAMES
from llmtune.recipe.located_yaml import Key
from llmtune.recipe.suite import HELD_OUT, ROWS, LocalTask, Suite, local_examples, local_rows, row_files, task_file
from llmtune.working import working

_EXAMPLES = "examples"
_READERS = {".csv": "csv", ".parquet": "parquet"}
# lm-eval renders task files' templates outside a sandbox: a template could reach any Python object.
_sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_sandbox.filters.update(lm_eval.utils.env.filters)
lm_eval.utils.env = _sandbox


def load_tasks(suite: Suite) -> list[Task]:
    """Load a suite's lm-eval tasks and their rows; raises RecipeError for a bad file, MachineError if offline."""
    return load_tasks_and_groups(suite)[0]


def load_tasks_and_groups(suite: Suite) -> tuple[list[Task], list[Group]]:
    """Load a suite's lm-eval tasks, those of its groups too, and the groups that have scores of their own.

    Raises as `load_tasks` does.
    """
    entries = [(index, entry) for index, entry in enumerate(suite.tasks) if entry != HELD_OUT]
    if not entries:
        return [], []
    by_name = any(isinstance(entry, LocalTask) or task_file(suite, entry) is None for _, entry in entries)
    with quiet(), working("loading tasks", len(entries), "tasks") as step:
        # The index of all of lm-eval's tasks takes some ten seconds.
        manager = TaskManager(include_defaults=by_name)
        tasks: list[Task] = []
        groups: list[Group] = []
        taken = dict.fromkeys(OWN_NAMES, "a part of llmtune's own")
        for index, entry in entries:
            loaded, group = _load(suite, index, entry, manager)
            scored = [group] if group is not None and group.has_aggregation else []
            _take_names(suite, index, [*(task.task_name for task in loaded), *(one.name for one in scored)], taken)
            tasks += loaded
            groups += scored
            step()
        return tasks, groups


def _take_names(suite: Suite, index: int, names: list[str], taken: dict[str, str]) -> None:
    """Raise RecipeError for a name whose results would replace those of another entry or part."""
    for name in names:
        if name in taken:
            remedy = "leave one out, or rename the task in a task file (task: NAME)"
            raise suite.error(("tasks", index), f"{name} is the name of {taken[name]} already; {remedy}")
    taken |= dict.fromkeys(names, f"tasks.{index}")


def _load(suite: Suite, index: int, entry: str | LocalTask, manager: TaskManager) -> tuple[list[Task], Group | None]:
    key = ("tasks", index)
    name = entry.task if isinstance(entry, LocalTask) else entry
    file = None if isinstance(entry, LocalTask) else task_file(suite, entry)
    if file is None and name not in manager.all_tasks:
        raise suite.error(key, f"{name!r} is not a task of lm-eval{nearest(name, [HELD_OUT, *manager.all_tasks])}")
    try:
        specs: list[Any] = [name]
        if isinstance(entry, LocalTask):
            specs = _on_local_rows(suite, index, entry, manager)
        elif file is not None:
            specs = [_from_file(suite, index, file)]
        loaded = manager.load(specs)
    except LlmtuneError:
        raise
    except Exception as error:
        raise _explained(suite, key, name, error) from error
    tasks = list(loaded["tasks"].values())
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        raise suite.error(key, f"{name} runs code that the model writes; llmtune does not")
    if isinstance(entry, LocalTask) or file is not None:
        for task in tasks:
            _check_rows(suite, key, task)
            _rehearse(suite, key, task)
    local = local_group(manager, name, tasks) if isinstance(entry, LocalTask) else None
    return tasks, local or loaded.get("groups", {}).get(name)


def _rehearse(suite: Suite, key: Key, task: Task) -> None:
    """Raise RecipeError for a task of the user's own that lm-eval cannot score, whatever a model answers."""
    try:
        scores = rehearse(task, suite.shots)
    except Exception as error:
        raise suite.error(key, f"{task.task_name}: cannot be scored: {kind_and_line(error)}") from error
    if not scores:
        raise suite.error(key, f"{task.task_name}: gives no score; give it a metric_list")


def _check_rows(suite: Suite, key: Key, task: Task) -> None:
    """Raise RecipeError, naming the row, for one of the user's own rows that cannot be asked or has no answer."""
    for number, row in enumerate(task.eval_docs, 1):
        try:
            text, answer = task.doc_to_text(row), task.doc_to_target(row)
            choices: Any = task.doc_to_choice(row) if task.get_config("doc_to_choice") is not None else None
        except Exception as error:
            raise suite.error(key, f"{task.task_name}: row {number} cannot be asked: {kind_and_line(error)}") from error
        is_choice = choices is not None and task.OUTPUT_TYPE == "multiple_choice"
        right = text if is_choice and isinstance(text, int) else answer
        if is_choice and not _is_one_of(right, choices):
            reason = f"its answer {str(right)[:80]!r} is none of its {len(choices)} choices"
            raise suite.error(key, f"{task.task_name}: row {number}: {reason}")
        if right is None:
            raise suite.error(key, f"{task.task_name}: row {number} has no answer")


def _is_one_of(answer: object, choices: list[str]) -> bool:
    """Tell whether an answer is a choice, by its place or its text, or a list of such."""
    if isinstance(answer, list):
        return bool(answer) and all(_is_one_of(one, choices) for one in answer)
    return answer in choices if isinstance(answer, str) else isinstance(answer, int) and 0 <= answer < len(choices)


def _explained(suite: Suite, key: Key, name: str, error: Exception) -> LlmtuneError:
    """Turn whatever kept lm-eval from loading a task into one line: what this machine lacks, or a wrong task."""
    if _is_offline(error):
        reason = f"{name} needs its rows from the Hub, which cannot be reached (offline?)"
        remedy = f"give a local file with {{task: {name}, rows: FILE}}, or set eval.suite: quick"
        return MachineError(str(suite.error(key, f"{reason}; {remedy}")))
    lack = _package_lacks(name, error) or machine_lacks(error)
    if lack:
        return MachineError(str(suite.error(key, f"lm-eval cannot load {name}: {lack}")))
    while isinstance(error, DatasetsError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # datasets says itself only that something failed
    return suite.error(key, f"lm-eval cannot load {name}: {kind_and_line(error)}")


def _package_lacks(name: str, error: Exception) -> str | None:
    """Say which package a task of lm-eval needs, if it is that, and how to install all that it needs."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    extras = importlib.metadata.metadata("lm_eval").get_all("Provides-Extra") or []
    package = f'"lm_eval[{name}]"' if name in extras else error.name
    return f"it needs the Python package {error.name}; pip install {package}"


def _is_offline(error: BaseException | None) -> bool:
    """Tell whether an error, or the one that it came from, means that the Hub cannot be reached."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | httpx2.TransportError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_local_rows(suite: Suite, index: int, entry: LocalTask, manager: TaskManager) -> list[dict[str, Any]]:
    """Return the configuration of a task, or of each task of a group, with its rows read from local files."""
    names, rows, examples = member_names(manager, entry.task), local_rows(suite, entry), local_examples(suite, entry)
    is_group, key = names != [entry.task], ("tasks", index, "rows")
    if is_group and not rows.is_dir():
        remedy = "name one of them, or give a folder with a file of rows for each, by its name"
        raise suite.error(("tasks", index, "task"), f"{entry.task!r} is a group of tasks; {remedy}")
    if not is_group and rows.is_dir():
        raise suite.error(key, f"{rows} is a folder, and {entry.task} is one task; give a file")
    configs = []
    for name in names:
        files = [rows, examples] if not is_group else [_member_file(suite, index, at, name) for at in (rows, examples)]
        configs.append(_with_rows(suite, index, manager, name, files))
    return configs


def _member_file(suite: Suite, index: int, folder: Path | None, name: str) -> Path | None:
    """Return the file in a folder that is named after a task; raises RecipeError where there is none."""
    if folder is None:
        return None
    file = row_files(folder).get(name)
    if file is None:
        raise suite.error(("tasks", index), f"no file {folder / name}.jsonl (or {', '.join(ROWS[1:])})")
    return file


def _with_rows(suite: Suite, index: int, manager: TaskManager, name: str, files: list[Path | None]) -> dict[str, Any]:
    """Return a task's own configuration with its questions, and its worked examples if any, read from local files."""
    file = manager.task_index[name].yaml_path
    config = {} if file is None else load_task_yaml(file)
    split = config.get("test_split") or config.get("validation_split")
    if split is None:
        raise suite.error(("tasks", index, "task"), f"{name!r} is a task of Python code, which reads no local rows")
    places = zip((split, _EXAMPLES), files, strict=True)
    data = {place: _not_empty(suite, index, rows) for place, rows in places if rows}
    readers = {_READERS.get(rows.suffix, "json") for rows in data.values()}
    if len(readers) > 1:
        raise suite.error(("tasks", index, "examples"), "is of another format than rows; give both in one")
    has_examples = _EXAMPLES in data
    writes_examples = (config.get("fewshot_config") or {}).get("samples") is not None
    splits = {"training_split": None, "validation_split": None, "test_split": split}
    splits["fewshot_split"] = _EXAMPLES if has_examples else None
    sources = {place: str(rows) for place, rows in data.items()}
    source = {"dataset_path": readers.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": sources}}
    return {**config, **splits, **source, **({} if has_examples or writes_examples else {"num_fewshot": 0})}


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
        config["dataset_kwargs"]["data_files"] = {
            split: str(_not_empty(suite, index, Path(rows))) for split, rows in located.items()
        }
    return config


def _not_empty(suite: Suite, index: int, rows: Path) -> Path:
    """Return a file of rows; raises RecipeError for one without any content."""
    if not rows.stat().st_size:
        raise suite.error(("tasks", index), f"{rows}: is empty")
    return rows
