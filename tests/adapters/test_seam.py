"""Adapters meet the rest of llmtune at one class: nothing else asks for a kind, and no list forgets one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmtune.adapters.kinds import KINDS
from tests.support import ROOT, matrix

PACKAGE = ROOT / "llmtune"
FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in ("recipe", "adapters")
)
CLASSES = {spec.__name__ for spec in KINDS.values()}
WITHOUT_RECIPE = {"ia3"}
"""Kinds that no shipped recipe uses."""


def kind_checks(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a source file that ask which kind an adapter is, each with what it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [part for operand in (node.left, *node.comparators) for part in _parts(operand)]
            if any(_is_kind(operand) or _names_kind(operand) for operand in operands):
                yield node.lineno, "compares an adapter's kind"
        elif isinstance(node, ast.Match) and (_is_kind(node.subject) or _is_adapter(node.subject)):
            yield node.lineno, "matches an adapter's kind"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            asks = node.func.id in ("isinstance", "issubclass", "getattr", "hasattr")
            if asks and (_is_adapter(node.args[0]) or any(_is_class(part) for a in node.args for part in _parts(a))):
                yield node.lineno, f"asks an adapter with {node.func.id}"


def _parts(node: ast.expr) -> list[ast.expr]:
    """The members of a literal collection or of a union, or the expression itself."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return node.elts
    if isinstance(node, ast.BinOp):
        return [*_parts(node.left), *_parts(node.right)]
    return [node]


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_adapter(node: ast.expr) -> bool:
    return _last_name(node) in ("adapter", "spec")


def _is_class(node: ast.expr) -> bool:
    return _last_name(node) in CLASSES


def _is_kind(node: ast.expr) -> bool:
    """Whether an expression is `adapter["kind"]`, or the kind of an adapter or a method."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "kind" and _is_adapter(node.value)
    return isinstance(node, ast.Attribute) and node.attr == "kind"


def _names_kind(node: ast.expr) -> bool:
    """Whether an expression is the name of a kind; none is a value of other settings too."""
    return isinstance(node, ast.Constant) and node.value in set(KINDS) - {"none"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_asks_which_kind_an_adapter_is(file: Path) -> None:
    lines = [f"{file.relative_to(ROOT)}:{line} {what}" for line, what in kind_checks(file.read_text(encoding="utf-8"))]
    assert not lines, f"{'; '.join(lines)}: ask a member of llmtune.adapters.base.AdapterSpec"


@pytest.mark.parametrize(
    "line",
    [
        'adapter.kind == "none"',
        'recipe.method.adapter.kind != "none"',
        'adapter["kind"] == "none"',
        'base["adapter"] == "bottleneck"',
        'name in ("lora", "ia3")',
        "isinstance(recipe.method.adapter, Other)",
        "isinstance(thing, Lora | Ia3)",
        "isinstance(thing, (NoAdapter, int))",
        'getattr(recipe.method.adapter, "form", None)',
        'hasattr(adapter, "form")',
        "match adapter:\n    case _: pass",
    ],
)
def test_sees_every_way_to_ask_for_a_kind(line: str) -> None:
    assert [number for number, _ in kind_checks(line)] == [1]


def test_allows_what_does_not_ask_for_a_kind() -> None:
    source = (
        'KINDS[base["adapter"]].registered_by\nquantize == "none"\nisinstance(module, LoraLayer)\nadapter.trains_base'
    )
    assert list(kind_checks(source)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_finds_file_matrix_row_and_documents_of_every_kind(kind: str) -> None:
    spec, document = KINDS[kind], matrix.DOCUMENT.read_text(encoding="utf-8")
    assert spec.__module__ == f"llmtune.adapters.{kind}", f"{spec.__name__} belongs into llmtune/adapters/{kind}.py"
    assert kind in {adapter["kind"] for adapter in matrix.ADAPTERS.values()}, f"{kind} is not in matrix.ADAPTERS"
    assert kind in {adapter["kind"] for adapter, _ in matrix.RATES.values()}, f"{kind} is not in matrix.RATES"
    assert re.search(rf"^\| `{kind}` \|", document, re.MULTILINE), f"docs/methods.md describes no `{kind}`"
    assert re.search(rf"^\| {kind}[ ,]", document, re.MULTILINE), f"docs/methods.md has no default rate of {kind}"
    assert re.search(rf"^\| model \|.* {kind} \|", document, re.MULTILINE), f"docs/methods.md tried no {kind}"


def test_finds_a_recipe_of_every_kind_or_names_the_lack() -> None:
    recipes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "recipes").rglob("*.yaml")]
    used = {recipe["method"].get("adapter", {"kind": "none"})["kind"] for recipe in recipes}
    missing = set(KINDS) - used
    assert missing == WITHOUT_RECIPE, f"kinds without a shipped recipe: {', '.join(sorted(missing))}"
