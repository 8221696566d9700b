"""The command line: help, usage errors, --json, --verbose, shell completion, and the shipped recipes."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import llmtune
from llmtune import recipe
from llmtune.cli import main
from llmtune.cli.app import build
from llmtune.cli.catalog import COMMANDS
from llmtune.cli.output import results
from llmtune.cli.shipped import recipes
from llmtune.files import shipped_folder
from llmtune.launch import process
from llmtune.launch.ending import Exit
from llmtune.run import Run
from tests.support import ROOT, runs, tiny
from tests.support.recipes import GOOD, write

NAMES = [command.name for command in COMMANDS]
NEEDED_FOR_HELP = {
    *(
        "annotated-doc",
        "annotated-types",
        "attrs",
        "llmtune",
        "markdown-it-py",
        "mdurl",
        "pydantic",
        "pydantic-core",
        "pygments",
    ),
    *("pyyaml", "rich", "shellingham", "typer", "typing-extensions", "typing-inspection"),
}
"""Packages that a first word may wait for."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A trained run in the working folder."""
    monkeypatch.chdir(tmp_path)
    runs.trained(tmp_path, merge={"enabled": False}, eval={"suite": "none"})
    return Run(Path("run"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command prints on stdout and on stderr."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    return out, err


def test_bare_command_shows_every_command_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys)
    assert out == printed(capsys, "--help")[0]
    assert all(re.search(rf"^. {name} ", out, re.MULTILINE) for name in NAMES)
    assert [out.index(title) for title in ("To start", "To train", "After training", "Other")] == sorted(
        out.index(title) for title in ("To start", "To train", "After training", "Other")
    )
    assert printed(capsys, "--version")[0] == f"llmtune {llmtune.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_of_every_command_has_examples_that_parse(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, command.name, "--help")
    assert "--verbose" in out
    assert ("--json" in out) == (command.name not in ("chat", "schema"))
    group: Any = typer.main.get_command(build())
    for example in command.examples:
        assert example in " ".join(re.sub(r"[│╭╮╰╯─]", "", out).split()) or len(example) > 70
        words = example.split(" > ")[0].split()
        assert words[:2] == ["llmtune", command.name]
        context = group.make_context("llmtune", words[1:])
        group.get_command(context, command.name).make_context(command.name, words[2:], parent=context)


@pytest.mark.parametrize(
    ("arguments", "message", "see"),
    [
        (["rnu"], "there is no command 'rnu'; did you mean 'run'?", "llmtune"),
        (["evaluate"], "there is no command 'evaluate'; did you mean 'eval'?", "llmtune"),
        (["xyzzy"], "there is no command 'xyzzy'", "llmtune"),
        (["version"], "there is no command 'version'; here it is 'llmtune --version'", "llmtune"),
        (["sft"], "there is no command 'sft'; here it is 'llmtune run'", "llmtune"),
        (["run", "--epochs", "3"], "no such option: --epochs; a recipe's value is set by --set", "llmtune run"),
        (["train", "--config", "a.yaml"], "no such option: --config; give the file as it is: llm", "llmtune train"),
        (["chat", "--epochs", "3"], "no such option: --epochs", "llmtune chat"),
        (["recipe.yaml"], "there is no command 'recipe.yaml'; did you mean 'llmtune run recipe.yaml'?", "llmtune"),
        (["run", "--ovrwrite", "x"], "no such option: --ovrwrite; did you mean --overwrite?", "llmtune run"),
        (["--versoin"], "no such option: --versoin; did you mean --version?", "llmtune"),
        (["run"], "missing argument", "llmtune run"),
        (["plan", "a", "b"], "got unexpected extra argument", "llmtune plan"),
        (["chat", "run", "--temperature", "hot"], "invalid value for '--temperature'", "llmtune chat"),
        (["chat", "run", "--top-p", "2"], "invalid value for '--top-p'", "llmtune chat"),
        (["run", "--a\n\x1b[2J"], "no such option: --a \\x1b[2J", "llmtune run"),
    ],
)
def test_usage_error_is_one_line_with_where_the_help_is(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, see: str
) -> None:
    out, err = printed(capsys, *arguments, code=2)
    line = err.removesuffix("\n")
    assert out == ""
    assert line.splitlines() == [line]
    assert line.startswith(f"llmtune: {message}")
    assert line.endswith(f" (see: {see} --help)")


def test_help_imports_what_the_command_line_needs_and_nothing_else() -> None:
    code = "import sys\nfrom llmtune.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    installed = importlib.metadata.packages_distributions()
    used = {re.sub(r"[_.]", "-", one).lower() for name in names for one in installed.get(name, [])}
    assert used - {"coverage", "setuptools"} <= NEEDED_FOR_HELP  # what measures the tests is in their processes too


@pytest.mark.slow
def test_completes_commands_options_and_shipped_recipes() -> None:
    def complete(words: str) -> str:
        variables = {"_LLMTUNE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
        command = [sys.executable, "-c", "from llmtune.cli import main; main()"]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True).stdout

    assert '"merge"' in complete("llmtune me")
    assert '"--overwrite"' in complete("llmtune run --over")
    assert '"qwen3-4b/lora"' in complete("llmtune recipes qwen3-4b/lo")


@pytest.mark.slow
def test_json_is_one_object_on_stdout_and_all_else_on_stderr(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(*arguments: str) -> Any:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    rows = tiny.write_rows(Path("mine.jsonl"), tiny.sums(5))
    written = answer("init", str(rows), "-o", "a.yaml")
    assert (written["recipe"], written["notes"], written["advised"]["choice"]["arm"]) == ("a.yaml", [], "lora")
    assert answer("recipes")["recipes"][0]["name"] == "quickstart"
    assert answer("recipes", "quickstart") == {"name": "quickstart", "recipe": "quickstart.yaml"}
    assert answer("plan", "recipe.json")["in_words"] == "LoRA (rank 4)"
    assert answer("report", "run") == {"run": "run", "report": "run/report.html"}
    done = answer("run", "run")
    assert (done["run"], done["delta"], done["merged"]) == ("run", "run/delta", None)
    assert set(done["steps"]) == {"train", "report"}
    assert answer("train", "run")["delta"] == "run/delta"


def test_json_sends_what_child_processes_print_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with results(True) as give:
        print("from here")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        give({"path": Path("a/b")}, lambda: pytest.fail("shown to people"))
    out, err = capfd.readouterr()
    assert json.loads(out) == {"path": "a/b"}
    assert "from here" in err
    assert "from a child" in err
    print("again")
    assert capfd.readouterr().out == "again\n"


def test_verbose_shows_the_traceback_and_tells_child_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []

    def start(settings: Any, words: list[str]) -> Exit:
        told.append(os.environ.get("LLMTUNE_VERBOSE"))
        return Exit(4, "no training")

    monkeypatch.setattr(process, "run_training", start)
    file = str(write(tmp_path, GOOD))
    out = f"--out={tmp_path / 'run'}"
    _, err = printed(capsys, "train", file, out, code=4)
    assert err.splitlines() == ["llmtune: no training"]
    _, err = printed(capsys, "train", file, out, "--verbose", code=4)
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1] == "llmtune: no training"
    printed(capsys, "--verbose", "train", file, out, code=4)
    assert told == [None, "1", "1"]
    assert "LLMTUNE_VERBOSE" not in os.environ


def test_tells_once_of_keys_under_an_old_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "run_training", lambda *_: Exit(4, "no training"))
    file = write(tmp_path, GOOD + "memory: {prefix: keep}\n")
    _, err = printed(capsys, "train", str(file), f"--out={tmp_path / 'run'}", code=4)
    note, error = err.splitlines()
    assert note == (
        f"llmtune: note: {file}:4: memory.prefix is read as memory.frozen_blocks: cache; write that from now on"
    )
    assert error == "llmtune: no training"


def test_run_folder_takes_options_or_refuses_them_by_name(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = printed(capsys, "run", "run", "--overwrite", code=2)
    assert err == (
        "llmtune: --overwrite: is for a recipe; run is a run. To train it again: llmtune train run --overwrite\n"
    )
    _, err = printed(capsys, "run", "run", "--out", "other", code=2)
    assert err == "llmtune: --out other: is for a recipe; run is a run already and stays where it is\n"
    _, err = printed(capsys, "run", "run", "--set", "method.lr=1", code=2)
    assert err.startswith("llmtune: --set method.lr=1: method is part of what the run in run is; that is another run")
    out, _ = printed(capsys, "run", "run", "--set", "launch.processes=1")
    assert "report  run/report.html" in out
    assert recipe.load(run.recipe_file).launch.processes == 1


def test_says_that_a_run_is_trained_already(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "train", "run")
    again = "it is trained already; to train it again, from the start: llmtune train run --overwrite"
    assert (out, err) == ("delta   run/delta\n", f"llmtune: run: {again}\n")
    assert run.done("train")


@pytest.mark.usefixtures("quick")
def test_run_does_a_step_again_whose_settings_changed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, "run", "run", "--set", "merge.enabled=true")
    assert "merged, bfloat16" in out
    out, _ = printed(capsys, "run", "run")
    assert "merged, " not in out
    out, _ = printed(capsys, "run", "run", "--set", "merge.dtype=float32")
    assert "merged, float32" in out
    assert run.done("train")
    assert recipe.load(run.recipe_file).merge.dtype == "float32"


def test_every_shipped_recipe_is_listed_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, "recipes")
    lines = out.splitlines()
    files = sorted(shipped_folder("recipes").rglob("*.yaml"))
    assert len(recipes()) == len(files) == len([line for line in lines if re.match(r"\S+ {2,}\S.{10}", line)])
    assert lines[0].startswith("quickstart ")


def test_copies_a_shipped_recipe_that_works_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = printed(capsys, "recipes", "qwen3-4b/gradual")
    assert out == "wrote gradual.yaml; next: llmtune check gradual.yaml\n"
    copy = recipe.load(Path("gradual.yaml"))
    assert copy.method == recipe.load(shipped_folder("recipes") / "qwen3-4b" / "gradual.yaml").method
    assert all(Path(str(source)).is_absolute() for source in (copy.data.train, copy.data.eval, copy.data.test))
    assert Path(str(copy.data.train)).is_file()
    assert Path("gradual.yaml").read_text().startswith("# yaml-language-server: $schema=file:///")
    for arguments, message in (
        (["qwen3-4b/gradual"], "gradual.yaml: exists already and is not overwritten"),
        (["gradual"], "there is no shipped recipe 'gradual'; did you mean granite3-8b/gradual or olmo2-1b/gradual"),
        (["qwen3-4b/gradul"], "did you mean 'qwen3-4b/gradual'?"),
        (["-o", "x.yaml"], "-o x.yaml: is for a copy; name the recipe: llmtune recipes NAME -o x.yaml"),
        (["quickstart", "-o", "gradual.yaml/x.yaml"], "gradual.yaml is a file, not a folder"),
    ):
        assert message in printed(capsys, "recipes", *arguments, code=2)[1]


@pytest.mark.slow
def test_init_takes_the_file_by_place_or_by_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(Path("rows.jsonl"), tiny.sums(5))
    printed(capsys, "init", "rows.jsonl", "-o", "a.yaml")
    printed(capsys, "init", "--data", "rows.jsonl", "-o", "b.yaml")
    assert Path("a.yaml").read_text() == Path("b.yaml").read_text()
    assert "give one of them" in printed(capsys, "init", "a", "--data", "b", code=2)[1]
    assert (
        "note: some/model is not on this machine yet"
        in printed(capsys, "init", "rows.jsonl", "--model", "some/model", "-o", "c.yaml")[1]
    )


def test_wheel_holds_what_commands_read_beside_the_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {source: f"llmtune/{source}" for source in included}
    assert set(included) == {"accelerate_configs", "eval", "recipes", "docs/recipe.schema.json"}
    assert all((ROOT / source).exists() for source in included)
