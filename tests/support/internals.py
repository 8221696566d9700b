"""Finds where llmtune reaches into other libraries; `python -m tests.support.internals` writes docs/internals.md."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeGuard

import llmtune
from tests.support import ROOT

PACKAGE = ROOT / "llmtune"
LEDGER = ROOT / "tests" / "internals.toml"
PAGE = ROOT / "docs" / "internals.md"
MOVING = {"accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "peft", "transformers", "trl"}
"""Libraries whose modules move between releases: only what their documentation names is public."""
TENSOR = {"data", "grad", "_version"}
"""Attributes of a tensor, which count as its own where a class of llmtune has one of that name too."""
INTRODUCTION = """# Other libraries' internals

llmtune uses some parts of other libraries that those do not document: private names, replaced methods, attributes it
sets. A new release may change each of them. Every row names the test that fails when that happens.

This page is written by `python -m tests.support.internals` from `tests/internals.toml`. `tests/test_internals.py`
finds each use in the source and fails for one that is not listed, and for a row without a use or without a test.
`make test-oldest` and `make test-newest` run the fast tests against both ends of the versions that llmtune allows.

| library | what | where | why | test |
|---|---|---|---|---|
"""


def ledger() -> dict[str, Any]:
    """The ledger: `documented`, uses that documentation allows, and `row`, all others with reason and test."""
    return tomllib.loads(LEDGER.read_text())


def page() -> str:
    """docs/internals.md, as the ledger has it."""
    rows = sorted(ledger()["row"], key=lambda row: (row["library"], row["uses"]))
    cells = (
        (
            row["library"],
            "<br>".join(f"`{use}`" for use in row["uses"]),
            ", ".join(row["where"]),
            row["why"],
            row["test"],
        )
        for row in rows
    )
    return INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def uses() -> dict[str, set[str]]:
    """Every use of another library's internals in llmtune but documented ones, with the packages that it is in."""
    documented = ledger()["documented"]
    return {use: packages for use, packages in all_uses().items() if use not in documented}


@cache
def all_uses() -> dict[str, set[str]]:
    """Every use of another library's internals in llmtune, with the packages that it is in."""
    trees = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(trees.values())
    where: dict[str, set[str]] = defaultdict(set)
    for file, tree in trees.items():
        for use in written(tree, own):
            where[use].add(file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for kind in _classes():
        for use in inherited(kind):
            where[use].add(kind.__module__.split(".")[1])
    return dict(where)


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Names that source files give to attributes: what stands in their modules and classes, and what self is given."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef):
            names |= {statement.name for statement in node.body if isinstance(statement, ast.FunctionDef)}
            assigned = [target for statement in node.body for target in _targets(statement)]
            names |= {target.id for target in assigned if isinstance(target, ast.Name)}
        names |= {target.attr for target in _targets(node) if _is_self(target)}
    return names - TENSOR


def written(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Uses that a source file shows: imports, private names, assignments, patches by name, registrations."""
    foreign = _foreign_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        if isinstance(node, ast.Attribute) and _private(node.attr) and not _is_self(node) and not _is_super(node):
            root, _, rest = ast.unparse(node).partition(".")
            if root in foreign:
                yield f"{foreign[root]}.{rest}"
            elif node.attr not in own and root not in sys.stdlib_module_names:
                yield f".{node.attr}"
        for target in _targets(node):
            yield from _assignment(target, own, foreign)
        if isinstance(node, ast.Call):
            yield from _call(node, foreign)


def _foreign_imports(tree: ast.AST) -> dict[str, str]:
    """The names in a source file that stand for another library or a part of it, and what they are called there."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [(alias.asname, alias.name.split(".")[0]) for alias in node.names if _is_foreign(alias.name)]
            names |= {asname or root: root for asname, root in roots}
        elif isinstance(node, ast.ImportFrom) and _is_foreign(node.module):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    return names


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {a.name}" for a in node.names if _is_foreign(a.name) and "._" in a.name)
        return
    module, names = str(node.module), [alias.name for alias in node.names]
    if not _is_foreign(module):
        return
    root = module.split(".")[0]
    deep = root in MOVING and "." in module
    exported = deep and all(hasattr(importlib.import_module(root), name) for name in names)
    if "._" in module or (deep and not exported):
        yield f"import {module}"
    yield from (f"import {module}.{name}" for name in names if _private(name))


def _assignment(target: ast.expr, own: set[str], foreign: dict[str, str]) -> Iterator[str]:
    root = target
    while isinstance(root, ast.Attribute | ast.Subscript):
        root = root.value
    imported = isinstance(root, ast.Name) and root.id in foreign
    if isinstance(target, ast.Subscript) and _is_attributes(target.value):
        yield _entry(target.slice)
    elif isinstance(target, ast.Attribute | ast.Subscript) and imported:
        if "._" not in ast.unparse(target):
            yield f"{ast.unparse(target)} ="
    elif isinstance(target, ast.Attribute) and not (_is_self(target) or _private(target.attr)):
        # An autograd function keeps on ctx what it needs.
        yield from [f".{target.attr} ="] if target.attr not in own and ast.unparse(root) != "ctx" else []


def _call(node: ast.Call, foreign: dict[str, str]) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in ("setattr", "delattr") and (owner := ast.unparse(node.args[0])) != "self":
        yield f"{called}({owner})" if owner.split(".")[0] in foreign else f"{called}()"
    if isinstance(node.func, ast.Attribute) and _is_attributes(node.func.value) and node.func.attr in ("pop", "update"):
        yield _entry(node.args[0])
    if called.split(".")[0] in foreign and called.split(".")[-1].startswith("register"):
        yield f"{called}()"


def _entry(key: ast.expr) -> str:
    """What is written into an object's attributes, by name where the source tells it."""
    return f"vars()[{ast.unparse(key)}]" if isinstance(key, ast.Constant) else "vars()[]"


def inherited(kind: type) -> Iterator[str]:
    """Private names of foreign base classes that a class overrides or uses, and attributes of theirs that it sets."""
    bases = [base for base in kind.__mro__[1:] if _is_foreign(base.__module__)]
    if not bases:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    sources = [(base, _source(base)) for base in reversed(bases)]
    for name, sets in sorted(_touched(tree)):
        defines = re.compile(rf"\bself\.{name}\b|\bdef {name}\b|^    {name}\s*[:=]", re.MULTILINE)
        owner = next((base for base, source in sources if defines.search(source)), None)
        if owner is not None:
            yield f"{owner.__name__}.{name}{' =' if sets else ''}"


@cache
def _source(kind: type) -> str:
    """A class's source; nothing where it is written in C."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _touched(tree: ast.AST) -> set[tuple[str, bool]]:
    """Names of its own class that a class's source uses, if private, or sets: with whether it is a public one, set."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and _private(node.name):
            names.add((node.name, False))
        if isinstance(node, ast.Attribute) and (_is_self(node) or _is_super(node)) and _private(node.attr):
            names.add((node.attr, False))
        names |= {(t.attr, True) for t in _targets(node) if _is_self(t) and not _private(t.attr)}
    return names


def _classes() -> Iterator[type]:
    for found in pkgutil.walk_packages(llmtune.__path__, "llmtune."):
        if found.name not in ("llmtune.__main__", "llmtune.train"):  # commands
            module = importlib.import_module(found.name)
            yield from (
                kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == found.name
            )


def _targets(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to, or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        listed = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        listed = [node.target]
    elif isinstance(node, ast.With):
        listed = [item.optional_vars for item in node.items if item.optional_vars is not None]
    else:
        return []
    return [one for target in listed for one in (target.elts if isinstance(target, ast.Tuple) else [target])]


def _private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def _is_foreign(module: str | None) -> bool:
    root = str(module).split(".")[0]
    return root not in sys.stdlib_module_names and root not in ("llmtune", "tests", "None")


def _is_self(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_super(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"


def _is_attributes(node: ast.expr) -> bool:
    """Whether it is `vars(x)` or `x.__dict__` of anything but self."""
    text = ast.unparse(node)
    return (text.startswith("vars(") and text != "vars(self)") or (text.endswith(".__dict__") and "self." not in text)


if __name__ == "__main__":
    PAGE.write_text(page())
