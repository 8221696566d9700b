"""What the documents say is there, parses, resolves and can be read."""

import ast
import contextlib
import json
import re
import shlex
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from llmtune import cli
from llmtune.cli.app import build
from llmtune.launch.command import TRAIN_MODULE, config_file
from llmtune.recipe.sections import schema
from tests.support import ROOT, mistakes, reference

ROW = re.compile(r"^\| R\d+ \| (.+) \| (tests/[\w/]+\.py)::(\w+) \|$", re.MULTILINE)
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
COMMANDS = (
    "llmtune ",
    "python -m llmtune",
    "accelerate launch ",
    "torchrun ",
    "make ",
    "docker build ",
    "sky ",
    "launch/hf-jobs.sh ",
)
FOLDERS = ("accelerate_configs", "benchmarks", "docs", "eval", "launch", "llmtune", "recipes", "tests")
"""What a path in a document starts with where it means a file of this repository and not a user's."""
LONGEST_SENTENCE = 40


def named(file: Path) -> str:
    """A document's path in the repository."""
    return str(file.relative_to(ROOT))


documents = pytest.mark.parametrize("file", DOCUMENTS, ids=named)


def commands(text: str) -> list[list[str]]:
    """The words of the commands in a document's fenced blocks and inline code, without comments and prompts."""
    fenced = chain.from_iterable(block.splitlines() for block in FENCE.findall(text))
    lines = [line.strip().removeprefix("$ ") for line in [*fenced, *INLINE.findall(FENCE.sub("", text))]]
    return [shlex.split(line.split(" > ")[0], comments=True) for line in lines if line.startswith(COMMANDS)]


def parses(arguments: list[str]) -> bool:
    """Whether the command line takes these arguments."""
    group: Any = typer.main.get_command(build())
    context = group.make_context("llmtune", list(arguments))
    if arguments[0].startswith("-"):
        return True
    name, command, rest = group.resolve_command(context, list(arguments))
    with contextlib.suppress(typer.Exit):
        command.make_context(name, rest, parent=context)
    return True


def is_known(name: str) -> bool:
    """Whether the command line has a command, or an option, of that name."""
    return cli.main([name, "--help"]) == 0


def sentences(text: str) -> list[str]:
    """The sentences of a document's prose: no code blocks, tables, comments or headings; inline code is one word."""
    prose = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", text), flags=re.DOTALL)
    lines = ["" if re.match(r"\s*(\||#)", line) else line for line in prose.splitlines()]
    items = [re.sub(r"^\s*([-*]|\d+\.)\s+", "\n", line) for line in lines]
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", INLINE.sub("code", "\n".join(items)))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", plain)]
    return [sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?])[*_)\"]*\s+", part) if sentence]


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def functions(file: str) -> set[str]:
    """The names of the functions in a file of tests."""
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = ROW.findall(text)
    assert len(rows) == text.count("\n| R") >= 100
    for promise, file, name in rows:
        assert name in functions(file), f"{promise}: {file} has no {name}"
        assert len(promise.split()) <= LONGEST_SENTENCE, promise


def test_schema_for_editors_matches_recipes() -> None:
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == schema()


def test_recipe_reference_matches_schema() -> None:
    assert reference.DOCUMENT.read_text() == reference.page(schema()), "run: make reference"


def test_troubleshooting_shows_what_llmtune_prints(tmp_path: Path) -> None:
    text = mistakes.DOCUMENT.read_text()
    lines = mistakes.printed(text)
    assert len(lines) == 10
    assert mistakes.run_mistakes(text, tmp_path) == lines, "run: make reference"


@documents
def test_commands_parse(file: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(file.read_text()):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "accelerate":
            assert config_file(Path(words[words.index("--config_file") + 1]).stem).is_file(), words
            assert find_spec(words[words.index("-m") + 1]), words
        elif words[0] == "torchrun":
            assert get_args_parser().parse_args(words[1:]).training_script == TRAIN_MODULE, words
        elif words[0] in ("docker", "sky", "launch/hf-jobs.sh"):
            assert any((ROOT / word).is_file() for word in words), words
        else:
            arguments = words[3:] if words[0] == "python" else words[1:]
            # A name alone, as in "`llmtune plan` prints", is a mention.
            assert parses(arguments) if len(arguments) > 1 else all(map(is_known, arguments)), words


@documents
def test_files_that_documents_name_exist(file: Path) -> None:
    text = file.read_text()
    words = [word for command in commands(text) for word in command]
    words += [word for code in INLINE.findall(FENCE.sub("", text)) for word in code.split()]
    paths = [word.split("::")[0] for word in words if word.split("/")[0] in FOLDERS and "/" in word]
    assert [path for path in paths if not (ROOT / path).exists() and not list(ROOT.glob(path))] == []


@documents
def test_links_resolve(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", file.read_text())):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            there = file.parent / path if path else file
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text()), target


@documents
def test_sentences_are_short(file: Path) -> None:
    assert [text for text in sentences(file.read_text()) if len(text.split()) > LONGEST_SENTENCE] == []


def test_sentence_splitter_sees_prose_only() -> None:
    text = "# Title\n\nOne two.\nThree `a b c`!\n\n```\ncode. code.\n```\n\n| a. | b. |\n\n- four [five](x.md)\n- six\n"
    assert sentences(text) == ["One two.", "Three code!", "four five", "six"]


def test_keeps_readme_and_contributing_short() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size < 300_000
    for name, most in (("README.md", 149), ("LICENSE", 250), ("CHANGELOG.md", 250), ("CONTRIBUTING.md", 59)):
        assert (ROOT / name).stat().st_size > 300, name
        assert len((ROOT / name).read_text().splitlines()) <= most, name


def test_code_page_lists_every_package_and_module() -> None:
    package = ROOT / "llmtune"
    listed = re.findall(
        r"^\| `([\w.]+/?)` \|", (ROOT / "docs" / "code.md").read_text().split("Outside")[0], re.MULTILINE
    )
    folders = {f"{folder.name}/" for folder in package.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    modules = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(folders | modules)


def test_every_recipe_is_listed_in_the_readme_of_its_folder() -> None:
    for folder in (folder for folder in (ROOT / "recipes").iterdir() if folder.is_dir()):
        listed = re.findall(r"^\| `([\w-]+\.yaml)` \|", (folder / "README.md").read_text(), re.MULTILINE)
        assert sorted(listed) == sorted(file.name for file in folder.glob("*.yaml"))
