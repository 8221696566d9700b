"""What the documents say is there."""

import ast
import json
import re

from llmtune.recipe.sections import schema
from tests.support import ROOT

ROW = re.compile(r"^\| R\d+ \| (.+) \| (tests/[\w/]+\.py)::(\w+) \|$", re.MULTILINE)


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = ROW.findall(text)
    assert len(rows) == text.count("\n| R") >= 60
    for promise, file, name in rows:
        tree = ast.parse((ROOT / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{promise}: {file} has no {name}"


def test_the_schema_that_editors_use_is_the_recipes() -> None:
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == schema()


def test_the_files_that_people_look_for_are_there() -> None:
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert (ROOT / name).stat().st_size > 300, name
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60
