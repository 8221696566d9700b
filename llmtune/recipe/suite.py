"""Evaluation suites: a suite file, its tasks, and the refusal of task files that contain code."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llmtune.errors import FieldError, RecipeError, nearest
from llmtune.fields import Closed, Count, listed
from llmtune.files import shipped_folder, user_path
from llmtune.recipe.document import Document
from llmtune.recipe.located_yaml import Key, load_yaml
from llmtune.recipe.paths import describe_places, exists

HELD_OUT = "held_out"
"""The task that evaluates on the run's own rows."""
ROWS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
"""How the files of a local task's rows end."""
# Keys of an lm-eval task that run code, or that name a collection of tasks.
_FORBIDDEN_KEYS = ("class", "custom_dataset", "group", "task_list", "unsafe_code", "use_prompt")


class LocalTask(Closed):
    """An lm-eval task on a local file of rows, or a group on a folder of them, in place of the data set on the Hub."""

    task: Annotated[str, Field(min_length=1)]
    """The name of a task or group in lm-eval."""
    rows: Annotated[str, Field(min_length=1)]
    """A .jsonl, .jsonl.gz, .csv or .parquet file with the columns of the task's data set; for a group a folder with
    such a file for each of its tasks, by the task's name."""
    examples: Annotated[str | None, Field(min_length=1)] = None
    """The same for the rows that worked examples are taken from; there are none where not given."""


class Suite(Document):
    """Evaluation tasks and their settings."""

    tasks: Annotated[
        tuple[Annotated[str, Field(min_length=1)] | LocalTask, ...],
        BeforeValidator(listed),
        Field(min_length=1),
    ]
    """held_out (the run's own rows), a task of lm-eval, a task of eval/tasks by name, or a task's YAML file."""
    limit: Count | None = None
    """Rows per lm-eval task where the recipe does not set eval.limit; all where not given."""
    shots: Annotated[int | None, Field(ge=0)] = None
    """Worked examples before each question of an lm-eval task; the task's own number where not given."""
    chat_template: bool = False
    """Whether questions of lm-eval tasks go through the model's chat template."""

    @property
    def path(self) -> Path:
        """The file from which the suite was loaded."""
        return self._where.path

    def error(self, key: Key, message: str) -> RecipeError:
        """Make a one-line error that names the suite's file and the line of a key."""
        return self._where.error(key, message)


def load_suite(name: str, folders: tuple[Path, ...] = (Path(),)) -> Suite:
    """Load the suite that `eval.suite` names and check its task files; raises RecipeError, also for `none`.

    `folders` are where a suite file was looked for, for the message about one that is missing.
    """
    suite = Suite.load(_suite_file(name, folders))
    for index, entry in enumerate(suite.tasks):
        _check(suite, index, entry)
    return suite


def task_file(suite: Suite, name: str) -> Path | None:
    """Return a task's YAML file: a path from the suite's folder, or a shipped task; None for a task of lm-eval."""
    if name.endswith((".yaml", ".yml")):
        return suite.path.parent / user_path(name)
    shipped = shipped_folder("eval") / "tasks" / f"{name}.yaml"
    return shipped if shipped.is_file() else None


def local_rows(suite: Suite, entry: LocalTask) -> Path:
    """Return the file or folder of a local task's rows; a relative path starts at the suite's folder."""
    return suite.path.parent / user_path(entry.rows)


def local_examples(suite: Suite, entry: LocalTask) -> Path | None:
    """Return the file or folder of the rows that a local task's worked examples are taken from."""
    return None if entry.examples is None else suite.path.parent / user_path(entry.examples)


def row_files(rows: Path) -> dict[str, Path]:
    """Return the files of rows in a folder by the tasks that they are named after; a file alone is its own."""
    if not rows.is_dir():
        return {rows.name: rows}
    return {_stem(file): file for file in sorted(rows.iterdir()) if file.name.endswith(ROWS)}


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[0]


def needs_lm_eval(suite: Suite) -> bool:
    """Whether a suite has tasks beside the run's own rows, for which lm-eval has to be loaded."""
    return any(entry != HELD_OUT for entry in suite.tasks)


def check_rows(suite: Suite, count: int) -> None:
    """Raise FieldError where a suite evaluates on held-out rows and there are none."""
    if HELD_OUT in suite.tasks and not count:
        raise FieldError("data", "has no held-out rows; set data.test, data.eval or data.eval_fraction")


def resolve_suite(name: str) -> str:
    """Return the name of a shipped suite or `none` as it is, a suite file as an absolute path."""
    return name if name == "none" or name in _shipped() else str(_suite_file(name))


def _shipped() -> dict[str, Path]:
    return {file.stem: file for file in sorted(shipped_folder("eval").glob("*.yaml"))}


def _suite_file(name: str, folders: tuple[Path, ...] = (Path(),)) -> Path:
    shipped = _shipped()
    if name == "none":
        raise FieldError("eval.suite", f"is none, so nothing is evaluated; try {', '.join(shipped)} or a suite file")
    path = shipped.get(name, user_path(name))
    if not (exists(str(path)) and path.is_file()):
        if name.endswith((".yaml", ".yml")):
            raise FieldError("eval.suite", f"no file {name} ({describe_places(name, folders)})")
        known = f"{', '.join(shipped)}, none or a suite file"
        raise FieldError("eval.suite", f"{name[:80]!r} is not one of {known}{nearest(name, [*shipped, 'none'])}")
    return path.absolute()


def _check(suite: Suite, index: int, entry: str | LocalTask) -> None:
    key = ("tasks", index)
    if isinstance(entry, LocalTask):
        places = {"rows": local_rows(suite, entry), "examples": local_examples(suite, entry)}
        for name, place in places.items():
            if place is not None and not place.exists():
                raise suite.error((*key, name), f"no such file: {place}")
        if suite.shots and not entry.examples:
            reason = "all of them are questions, none a worked example; or give examples: FILE beside rows"
            raise suite.error(("shots",), f"must be 0 with local rows: {reason}")
        return
    file = task_file(suite, entry)
    if file is not None:
        if not file.is_file():
            raise suite.error(key, f"no such file: {file}")
        _refuse_code(file.resolve(), set())


def _refuse_code(file: Path, seen: set[Path]) -> None:
    """Raise RecipeError where a task file, or one that it includes, contains code; lm-eval's own files may."""
    if file in seen or file.is_relative_to(_lm_eval()):
        return
    located = load_yaml(file)
    for name in _FORBIDDEN_KEYS:
        if name in located.value:
            raise located.error((name,), "is not allowed in a task file: a task is data, not code")
    metrics = located.value.get("metric_list")
    for index, metric in enumerate(metrics if isinstance(metrics, list) else []):
        if isinstance(metric, dict) and "hf_evaluate" in metric:
            raise located.error(("metric_list", index, "hf_evaluate"), "is not allowed: it would run downloaded code")
    for included in _as_list(located.value.get("include")):
        target = (file.parent / str(included)).resolve()
        if not target.is_file():
            raise located.error(("include",), f"no such file: {target}")
        _refuse_code(target, {*seen, file})


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _lm_eval() -> Path:
    """Find the folder of the installed lm-eval without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).resolve().parent
