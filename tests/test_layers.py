"""Modules import only what stands left of them, and nothing light drags torch in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llmtune"
LAYERS = (
    {"__init__", "errors", "plan", "rates"},
    {"spec", "yamlfile"},
    {"method", "explain"},
    {"recipe"},
    {"run"},
    {
        "launch",
        "progress",
        "depth",
        "mlp",
        "bottleneck",
        "sharding",
        "checkpoint",
        "moved",
        "model",
        "adapter",
        "lora",
        "boundary",
        "states",
        "decoder",
        "building",
        "stream",
        "prefix",
        "allocator",
        "recompute",
        "casting",
        "cpu",
        "attention",
        "crossentropy",
        "lowrank",
        "unpadded",
        "loss",
        "data",
    },
    {"trainer"},
    set(),  # prepare, train, evaluate, merge, publish, compare, report, chat, ...: whatever has no other place
    {"cli", "__main__"},
)
STEPS = LAYERS.index(set())
LIGHT = ("errors", "plan", "rates", "spec", "method", "yamlfile", "explain", "recipe", "run", "allocator", "launch")
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "lm_eval", "huggingface_hub", "numpy")
COMMAND = """
import contextlib, io
from llmtune import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
    cli.main({arguments!r})
assert len(out.getvalue()) > 100
"""
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    """Where the part of the package that a module belongs to stands."""
    return next((place for place, names in enumerate(LAYERS) if module in names), STEPS)


def imported(source: str) -> set[str]:
    """The parts of the package that a source file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("llmtune.")}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def part(file: Path) -> str:
    """The part of the package that a file belongs to: the module, or the subpackage."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_left_of_it(file: Path) -> None:
    right = {name for name in imported(file.read_text()) if layer(name) > layer(part(file))}
    assert not right, f"{part(file)} imports {', '.join(sorted(right))}"


def test_imports_go_round_in_no_circle() -> None:
    uses: dict[str, set[str]] = {}
    for file in FILES:
        uses.setdefault(part(file), set()).update(imported(file.read_text()) - {part(file)})
    while uses:
        leaves = {name for name, needed in uses.items() if not needed & set(uses)}
        assert leaves, f"these import each other: {', '.join(sorted(uses))}"
        uses = {name: needed for name, needed in uses.items() if name not in leaves}


def test_the_check_sees_every_way_to_import() -> None:
    source = "import llmtune.run\nfrom llmtune import recipe, plan\ndef f():\n    from llmtune.errors import nearest\n"
    assert imported(source) == {"run", "recipe", "plan", "errors"}
    assert layer("method") < layer("recipe") < layer("launch") < layer("trainer") < layer("train") < layer("cli")


def heavy_after(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_what_is_above_the_line_never_imports_torch() -> None:
    assert heavy_after("import " + ", ".join(f"llmtune.{name}" for name in LIGHT)) == []


def test_the_commands_import_nothing_heavy_before_they_run() -> None:
    assert heavy_after("import llmtune.cli") == []


@pytest.mark.parametrize("arguments", [["--help"], ["schema"]])
def test_help_and_schema_import_nothing_heavy(arguments: list[str]) -> None:
    run = COMMAND.format(arguments=arguments)
    assert heavy_after(run) == []
