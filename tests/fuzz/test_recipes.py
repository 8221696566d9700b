"""Any recipe is accepted with every value in it, or refused in one line."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from llmtune import cli, terminal
from llmtune import recipe as recipes
from llmtune.errors import RecipeError
from llmtune.model.files.locate import locate_base
from llmtune.training.prepare import examine, resolve
from tests.fuzz.conftest import COUNT
from tests.fuzz.outcome import BrokenRuleError, Tally, unclean
from tests.fuzz.recipe_cases import CASES, SEEDS, Case, encode, first_difference
from tests.fuzz.shorthand import with_paths, write_out
from tests.support import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base and rows, once a plain recipe has loaded every library."""
    tiny.save_base(tmp_path / "base", blocks=4, tied=False)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(24))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def check(case: Case, folder: Path) -> None:
    """Do what `llmtune check` and `llmtune run` do with a recipe before training; raises where a value is ignored."""
    file = Path("recipe.yaml")  # in the working directory, so that paths stay as they are written
    file.write_bytes(case.content)
    recipe = recipes.load(file, list(case.overrides))
    lost = first_difference(write_out(read_plainly(case)), with_paths(recipe.model_dump()))
    if lost:
        raise BrokenRuleError(f"a value is lost: {lost}")
    base = locate_base(recipe.model, weights=False)
    examination = examine(recipe, 0, base)
    terminal.findings(examination.data.findings)
    terminal.plan(examination.table)
    json.dumps([examination.data.findings, examination.table.to_json()], ensure_ascii=False).encode()
    resolved = resolve(recipe, base, examination.layout.facts)
    again = folder / "resolved.yaml"
    again.write_text(recipes.dump(resolved), encoding="utf-8")
    changed = first_difference(resolved.model_dump(), recipes.load(again).model_dump())
    if changed:
        raise BrokenRuleError(f"the resolved recipe reads back otherwise: {changed}")


def check_by_command(case: Case, folder: Path) -> None:
    """Run `llmtune check`; raises where it does not end in success, or in one line and exit code 2 or 3."""
    file = folder / "recipe.yaml"
    file.write_bytes(case.content)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.main(["check", str(file), *(f"--set={override}" for override in case.overrides)])
    if code == 0:
        return
    last = (errors.getvalue().splitlines() or [""])[-1]
    problems = unclean(last, code)
    if problems or not last.startswith("llmtune: "):
        raise BrokenRuleError(f"{', '.join(problems)}: {errors.getvalue()[-500:]!r}")
    raise RecipeError(last)  # counts as refused


def read_plainly(case: Case) -> Any:
    """What a plain YAML reader finds in a file and its overrides."""
    try:
        recipe = yaml.safe_load(case.content.decode("utf-8-sig"))
        for override in case.overrides:
            dotted, _, text = override.partition("=")
            *parents, last = (int(part) if part.isdecimal() else part for part in dotted.split("."))
            container = recipe
            for part in parents:
                if isinstance(container, dict) and container.get(part) is None:
                    container[part] = {}
                container = container[part]
            container[last] = yaml.safe_load(text)
    except Exception as error:
        raise BrokenRuleError(f"accepted what a plain reader refuses: {error}") from error
    return recipe


def try_all(folder: Path, one: Callable[[Case, Path], None], count: int) -> Tally:
    """Judge `count` cases; raises for the smallest that breaks a rule."""
    for seed in SEEDS:
        one(Case(encode(yaml.safe_dump(seed))), folder)
    tally = Tally()

    @settings(settings.get_profile("fuzz"), max_examples=count)
    @given(CASES)
    def holds(case: Case) -> None:
        tally.judge(lambda: one(case, folder))

    holds()
    return tally


@pytest.mark.slow
def test_accepts_a_recipe_with_every_value_or_refuses_it_in_one_line(folder: Path, record_property: Any) -> None:
    tally = try_all(folder, check, COUNT)
    record_property("fuzz", str(tally))
    assert tally.outcomes["accepted"], "only refusals: nothing that is accepted was compared"
    assert tally.outcomes["refused"]


@pytest.mark.slow
def test_command_checks_a_recipe_or_refuses_it_in_one_line(folder: Path, record_property: Any) -> None:
    tally = try_all(folder, check_by_command, COUNT // 10)
    record_property("fuzz", str(tally))
    assert tally.outcomes["accepted"]
    assert tally.outcomes["refused"]
