"""Packages import only what stands left of them, nothing light drags torch in, and no folder grows past its size."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "llmtune"
FLOORS = (
    {"errors", "kernels", "loggers"},
    {"files", "numbers", "fields"},
    {"machine", "plan", "working"},
    {"run_log", "model"},
    {"adapters"},
    {"methods"},
    {"recipe"},
    {"run"},
    {"data", "launch", "storage", "tracking"},
    {"inference"},
    {"estimate", "frozen", "evaluation"},
    {"terminal", "arms", "pool", "timing"},
    {"training", "merging"},
    {"answering", "combining", "exporting", "advising", "searching"},
    {"reporting"},
    {"publishing"},
    {"api"},
    {"comparing", "tuning"},
    {"cli"},
    {"__main__", "bottleneck", "__init__", "train"},
)
"""Packages and modules, lowest first: each may import what stands on a lower floor, nothing beside or above it."""
MODULES_PER_FOLDER, LINES_PER_FILE = 14, 250
LIGHT = (
    "errors",
    "loggers",
    "files",
    "numbers",
    "machine.memory",
    "fields",
    "plan",
    "working",
    "adapters",
    "methods",
    "recipe",
    "run",
    "launch.command",
)
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "lm_eval", "huggingface_hub", "numpy")
COMMAND = """
import contextlib, io
from llmtune import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    cli.main({arguments!r})
assert len(out.getvalue()) > 100
"""
FILES = sorted(PACKAGE.rglob("*.py"))
ANY = {
    "cli/app.py": ["_refuse.error", "resolve_command.ctx"],
    "cli/commands/several.py": ["parse_args.ctx"],
    "evaluation/loaded_model.py": ["add_partial.req", "add_partial.res", "tok_decode.tokens"],
    "evaluation/metrics.py": ["finite.value"],
    "evaluation/step.py": ["_check_logits.model", "_load_tuned.live"],
    "evaluation/vllm/engine.py": ["__init__.engine", "_ask.options", "_score.found"],
    "kernels/attention.py": ["__call__.options", "make_mask.arguments", "make_mask.options"],
    "kernels/head.py": ["_forward_model.inputs", "_forward_model.named"],
    "kernels/recompute.py": ["_mlp_forward.mlp"],
    "recipe/located_yaml.py": ["_enter.container"],
    "training/objective.py": ["__init__.arguments", "_get_grad_norm.grad_norm", "train.named"],
    "training/passes/trainer.py": ["__init__.arguments"],
}
"""Every parameter declared as Any. Try object, a Protocol or a library's class before a row is added here."""


def unit(file: Path) -> str:
    """The package, or the top-level module, that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


UNITS = {unit(file) for file in FILES}


def floor(name: str) -> int:
    """The floor on which a unit stands."""
    return next(place for place, names in enumerate(FLOORS) if name in names)


def imported(source: str) -> set[str]:
    """The units that a source file imports, at its top or inside functions."""
    return {name.split(".")[1] for name in _names(source) if name.startswith("llmtune.")} & UNITS


def _names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_places_every_unit_on_a_floor() -> None:
    listed = [name for names in FLOORS for name in names]
    assert sorted(listed) == sorted(UNITS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(file: Path) -> None:
    here = unit(file)
    wrong = {name for name in imported(file.read_text()) - {here} if floor(name) >= floor(here)}
    assert not wrong, f"{here} imports {', '.join(sorted(wrong))}"


def test_imports_go_round_in_no_circle() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    uses = {name: _modules(file.read_text(), modules) - {name} for name, file in modules.items()}
    while uses:
        leaves = {name for name, needed in uses.items() if not needed & set(uses)}
        assert leaves, f"these import each other, or what does: {', '.join(sorted(uses))}"
        uses = {name: needed for name, needed in uses.items() if name not in leaves}


def _modules(source: str, known: Collection[str]) -> set[str]:
    """The modules of the package that a source imports: `from a import b` may name module a.b or a name in a."""
    return {part for name in _names(source) for part in (name, name.rpartition(".")[0]) if part in known}


def test_sees_every_way_to_import() -> None:
    source = "import llmtune.run\nfrom llmtune import recipe, plan\ndef f():\n    from llmtune.errors import nearest\n"
    assert imported(source) == {"run", "recipe", "plan", "errors"}


def test_code_page_shows_these_floors() -> None:
    rows = re.findall(r"^\| \d+ \| (`.+`) \|$", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == list(FLOORS[:-1])


def test_kernels_import_nothing_of_llmtune() -> None:
    used = {name for file in (PACKAGE / "kernels").rglob("*.py") for name in imported(file.read_text())}
    assert used <= {"kernels"}


def test_no_folder_and_no_file_is_too_large() -> None:
    folders = {file.parent for file in FILES}
    counts = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in counts.items() if count > MODULES_PER_FOLDER} == {}
    assert {name: count for name, count in lines.items() if count > LINES_PER_FILE} == {}


def any_parameters(source: str) -> list[str]:
    """The parameters that a source file declares as Any, as function.parameter."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return sorted(
        f"{function.name}.{node.arg}"
        for function in functions
        for node in ast.walk(function.args)
        if isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation).strip("'") == "Any"
    )


def test_every_parameter_of_type_any_is_listed() -> None:
    found = {str(file.relative_to(PACKAGE)): any_parameters(file.read_text()) for file in FILES}
    assert {file: names for file, names in found.items() if names} == ANY


def test_sees_every_parameter_of_type_any() -> None:
    source = "def f(a: Any, /, *b: Any, c: 'Any', d: list[Any], e=1, **g: Any):\n    def h(i: Any): ...\n"
    assert any_parameters(source) == ["f.a", "f.b", "f.c", "f.g", "h.i"]


def heavy_after(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_light_units_never_import_torch() -> None:
    assert heavy_after("import " + ", ".join(f"llmtune.{name}" for name in LIGHT)) == []


def test_commands_import_nothing_heavy_before_they_run() -> None:
    assert heavy_after("import llmtune.cli") == []


@pytest.mark.parametrize("arguments", [["--help"], ["schema"]])
def test_help_and_schema_import_nothing_heavy(arguments: list[str]) -> None:
    run = COMMAND.format(arguments=arguments)
    assert heavy_after(run) == []
