"""Suite files, and a task file on local rows."""

import json
from pathlib import Path
from typing import Any

import lm_eval

from llmtune import recipe
from llmtune.recipe.suite import Suite, load_suite
from llmtune.run import locates_mistakes
from tests.support import tiny

HARNESS = Path(lm_eval.__file__).parent / "tasks"


def load(folder: Path, text: str) -> Suite:
    """Load the suite of a file with this text."""
    (folder / "suite.yaml").write_text(text)
    return named(folder, str(folder / "suite.yaml"))


def named(folder: Path, name: str) -> Suite:
    """Load the suite that a recipe names so."""
    loaded = recipe.load(tiny.write_recipe(folder / "r.json", folder, folder / "x", eval={"suite": name}))
    return locates_mistakes(lambda located: load_suite(located.eval.suite))(loaded)


def mine(folder: Path, **keys: Any) -> str:
    """Write a suite with one task file, as JSON, which is YAML."""
    rows = tiny.write_rows(folder / "rows.jsonl", [{"q": f"is {n} odd?", "a": n % 2} for n in range(4)])
    config: dict[str, Any] = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
    }
    config |= {"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "a"}
    config |= {"doc_to_choice": ["no", "yes"], "metric_list": [{"metric": "acc"}]} | keys
    (folder / "task.yaml").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return "tasks: [task.yaml]"
