"""What a command gives: text for people, or with --json one object on stdout and everything else on stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.recipe.sections import Recipe
    from llmtune.run import Run

Give = Callable[[object, Callable[[], object]], object]
"""Takes a result as plain values, and the function that shows it to people."""
_SCORES = ("n", "of", "shots", "limit", "truncated", "metrics")


@contextlib.contextmanager
def results(as_json: bool) -> Iterator[Give]:
    """Show what the block gives, or print it as JSON when the block ends; nothing is printed where it raises."""
    if not as_json:
        yield lambda _, show: show()
        return
    values: list[object] = []
    with _stdout_on_stderr():
        yield lambda value, _: values.append(value)
    for value in values:
        print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send what this process and its children print to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def tell_notes(recipe: "Recipe") -> None:
    """Print what there is to tell of how a recipe was read."""
    for note in recipe.notes:
        print(f"llmtune: note: {note}", file=sys.stderr)


def outcome(run: "Run") -> dict[str, Any]:
    """What a run has done so far: its folders, the facts of each finished step, and the scores."""
    steps = run.manifest()["steps"]
    facts = {name: {key: value for key, value in step.items() if key != "files"} for name, step in steps.items()}
    paths = {
        "delta": run.delta if run.done("train") else None,
        "merged": run.merged if run.done("merge") else None,
        "report": run.report_file if run.done("report") else None,
    }
    return {"run": run.path, **paths, "steps": facts, **(scores(run) if run.done("eval") else {})}


def scores(run: "Run") -> dict[str, Any]:
    """The stored evaluation without its rows: scores of base and tuned model, and their differences."""
    from llmtune.evaluation.results import read_evaluation

    base, tuned = read_evaluation(run)
    stored = {"base": base, "tuned": tuned}
    models = {
        name: {task: {key: result.get(key) for key in _SCORES} for task, result in one["results"].items()}
        for name, one in stored.items()
    }
    return {"results": models, "differences": tuned.get("differences")}
