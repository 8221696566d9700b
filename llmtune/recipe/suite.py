"""What is asked of base and tuned model: a suite file, its tasks, and the refusal of task files that bring code."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError

from llmtune.errors import FieldError, RecipeError, nearest
from llmtune.fields import Closed
from llmtune.files import shipped_folder
from llmtune.recipe.located_yaml import Key, Located, load_yaml
from llmtune.recipe.mistakes import explain
from llmtune.recipe.sections import Count, Recipe

HELD_OUT = "held_out"
"""The task that asks the run's own rows."""
# Keys of an lm-eval task that stand for code, or for a collection of tasks.
_REFUSED = ("class", "custom_dataset", "group", "task_list", "unsafe_code", "use_prompt")


class LocalTask(Closed):
    """A task of lm-eval on rows of this machine, in place of its data set on the Hub."""

    task: Annotated[str, Field(min_length=1)]
    """The task's name in lm-eval."""
    rows: Annotated[str, Field(min_length=1)]
    """A .jsonl, .jsonl.gz, .csv or .parquet file with the columns of the task's data set."""


class Suite(Closed):
    """Tasks for lm-eval, and how they are asked."""

    tasks: Annotated[
        tuple[Annotated[str, Field(min_length=1)] | LocalTask, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Field(min_length=1),
    ]
    """held_out (the run's own rows), a task of lm-eval, a task of eval/tasks by name, or a task's YAML file."""
    limit: Count | None = None
    """Rows per lm-eval task where the recipe's eval.limit says nothing; all where not given."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Worked examples before each question of an lm-eval task."""
    chat_template: bool = False
    """Whether questions of lm-eval tasks go through the model's chat template."""

    _where: Located = PrivateAttr()

    @property
    def path(self) -> Path:
        """The file it was loaded from."""
        return self._where.path

    def error(self, key: Key, message: str) -> RecipeError:
        """A one-line error that names the suite's file and the line of a key."""
        return self._where.error(key, message)


def load_suite(recipe: Recipe) -> Suite:
    """The suite that a recipe names, its task files checked; raises RecipeError, also for the suite `none`."""
    located = load_yaml(_find(recipe))
    try:
        suite = Suite.model_validate(located.value)
    except ValidationError as error:
        raise explain(located, Suite, error) from error
    suite._where = located
    for index, entry in enumerate(suite.tasks):
        _check(suite, index, entry)
    return suite


def task_file(suite: Suite, name: str) -> Path | None:
    """The YAML file of a task: a path from the suite's folder, or a shipped task; None for a name of lm-eval's."""
    if name.endswith((".yaml", ".yml")):
        return suite.path.parent / Path(name).expanduser()
    shipped = shipped_folder("eval") / "tasks" / f"{name}.yaml"
    return shipped if shipped.is_file() else None


def local_rows(suite: Suite, entry: LocalTask) -> Path:
    """The file with a local task's rows, looked for from the suite's folder."""
    return suite.path.parent / Path(entry.rows).expanduser()


def beyond_held_out(suite: Suite) -> bool:
    """Whether a suite asks anything but the run's own rows, for which lm-eval's tasks have to be loaded."""
    return any(entry != HELD_OUT for entry in suite.tasks)


def check_rows(recipe: Recipe, suite: Suite, count: int) -> None:
    """Raise RecipeError where a suite asks the held-out rows and there are none."""
    if HELD_OUT in suite.tasks and not count:
        raise FieldError("data", "has no held-out rows; give data.test, data.eval or data.eval_fraction")


def resolved_suite(recipe: Recipe) -> str:
    """What a recipe calls its suite, a file by its absolute path."""
    name = recipe.eval.suite
    return name if name == "none" or name in _shipped() else str(_find(recipe))


def _shipped() -> dict[str, Path]:
    return {file.stem: file for file in sorted(shipped_folder("eval").glob("*.yaml"))}


def _find(recipe: Recipe) -> Path:
    name, shipped = recipe.eval.suite, _shipped()
    if name == "none":
        raise FieldError("eval.suite", f"is none, so nothing is evaluated; give {', '.join(shipped)} or a suite file")
    path = shipped.get(name, Path(name).expanduser())
    if not path.is_file():
        known = f"{', '.join(shipped)}, none or a suite file"
        raise FieldError("eval.suite", f"{name!r} is not one of {known}{nearest(name, [*shipped, 'none'])}")
    return path.absolute()


def _check(suite: Suite, index: int, entry: str | LocalTask) -> None:
    key = ("tasks", index)
    if isinstance(entry, LocalTask):
        if not local_rows(suite, entry).is_file():
            raise suite.error((*key, "rows"), f"no such file: {local_rows(suite, entry)}")
        if suite.shots:
            raise suite.error(("shots",), "must be 0 with local rows: they are the questions, there are none to show")
        return
    file = task_file(suite, entry)
    if file is not None:
        if not file.is_file():
            raise suite.error(key, f"no such file: {file}")
        _refuse_code(file.resolve(), set())


def _refuse_code(file: Path, seen: set[Path]) -> None:
    """Raise RecipeError where a task file, or one that it includes, brings code; lm-eval's own files may."""
    if file in seen or file.is_relative_to(_lm_eval()):
        return
    located = load_yaml(file)
    for name in _REFUSED:
        if name in located.value:
            raise located.error((name,), "is not allowed in a task file: a task is data, not code")
    metrics = located.value.get("metric_list")
    for index, metric in enumerate(metrics if isinstance(metrics, list) else []):
        if isinstance(metric, dict) and "hf_evaluate" in metric:
            raise located.error(("metric_list", index, "hf_evaluate"), "is not allowed: it would run downloaded code")
    for included in _listed(located.value.get("include")):
        target = (file.parent / str(included)).resolve()
        if not target.is_file():
            raise located.error(("include",), f"no such file: {target}")
        _refuse_code(target, {*seen, file})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _lm_eval() -> Path:
    """The folder of the installed lm-eval, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).resolve().parent
