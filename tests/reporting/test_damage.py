"""A page for every run: values that are null, absent, not finite or of another kind, and runs that ended early."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from llmtune.files import read_json
from llmtune.plan.distances import Everything
from llmtune.reporting.page import render
from llmtune.run import Run
from tests.support.pages import empty, falling, headings, page, stage, with_log

STAGES = [stage(0, 40, Everything(), {"0": 1e-3})]
WRONG = [None, math.nan, -math.inf, "text", "", True, -1, 10**400, [], [None], {}, {"key": None}, "\ud800"]
FILES = ["plan.json", "data.json", "manifest.json", "eval/base.json", "eval/tuned.json", "delta/base.json"]
Change = Callable[[], None]
LONGEST_LIST = 1


def changes(value: Any, turn: Iterator[Any] | None = None) -> Iterator[tuple[str, Change, Change]]:
    """Each part of a JSON value by name, with ways to spoil it and one to put it back; of a list its first item.

    Each part is null, absent, and one other wrong value in turn.
    """
    turn = turn or cycle(WRONG[1:])
    keys = list(value) if isinstance(value, dict) else range(min(len(value), LONGEST_LIST))
    for key in keys:
        part = value[key]
        for wrong in (None, next(turn)):
            yield f"{key} {wrong!r:.20}", _setter(value, key, wrong), _setter(value, key, part)
        if isinstance(value, dict):
            yield f"no {key}", lambda key=key: value.pop(key), _setter(value, key, part)  # type: ignore[misc]
        if isinstance(part, dict | list):
            yield from ((f"{key}.{name}", spoil, restore) for name, spoil, restore in changes(part, turn))


def _setter(value: Any, key: Any, new: Any) -> Change:
    def change() -> None:
        value[key] = new

    return change


@pytest.fixture(scope="module")
def copy(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of a finished run, to be damaged."""
    folder = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(finished.path, folder)
    return Run(folder)


@pytest.fixture(autouse=True)
def _recipes_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page reads its run's recipe four times, which no test here damages: two thirds of the time of a page."""
    recipes: dict[Path, Any] = {}
    load = Run.recipe
    monkeypatch.setattr(Run, "recipe", lambda run: recipes.get(run.path) or recipes.setdefault(run.path, load(run)))


def store(run: Run, file: Path, value: Any) -> None:
    """Write a damaged file, with the manifest's size put right so that its step still counts as done."""
    text = json.dumps(value)
    file.write_text(text)
    manifest = read_json(run.manifest_file)
    for entry in manifest["steps"].values():
        name = file.relative_to(run.path).as_posix()
        if name in entry["files"]:
            entry["files"][name]["bytes"] = len(text.encode())
    run.manifest_file.write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_any_wrong_value_in_a_file_leaves_a_page(copy: Run, name: str) -> None:
    file = copy.path / name
    before, manifest = file.read_bytes(), copy.manifest_file.read_bytes()
    value = json.loads(before)
    failures = []
    try:
        for what, spoil, restore in changes(value):
            spoil()
            if file == copy.manifest_file:
                file.write_text(json.dumps(value))
            else:
                store(copy, file, value)
            try:
                assert ">nan" not in render(copy)
            except Exception as error:
                failures.append(f"{what}: {error!r}")
            restore()
            copy.manifest_file.write_bytes(manifest)
    finally:
        file.write_bytes(before)
        copy.manifest_file.write_bytes(manifest)
    assert json.loads(before) == value
    assert failures == []


def test_any_wrong_value_in_a_log_leaves_a_page(tmp_path: Path) -> None:
    log = [*falling({"0": 1e-3}, 2), {"step": 2, "eval_loss": 1.0}]
    log += [{"step": 2, "frozen_blocks": "kept"}, {"step": 2, "warning": "look"}]
    run = with_log(empty(tmp_path), STAGES, log)
    for _, spoil, restore in changes(dict(enumerate(log))):
        spoil()
        run.log_file.write_text("".join(json.dumps(one) + "\n" for one in log))
        assert ">nan" not in render(run)
        restore()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00", '{"steps": 1}'], ids=repr)
@pytest.mark.parametrize("name", ["plan.json", "data.json", "eval/base.json", "eval/tuned.json", "log.jsonl"])
@pytest.mark.slow
def test_a_file_that_is_no_json_object_leaves_a_page(copy: Run, name: str, content: str) -> None:
    file = copy.path / name
    before, manifest = file.read_bytes(), copy.manifest_file.read_bytes()
    try:
        file.write_text(content)
        assert "<h1" in render(copy)
    finally:
        file.write_bytes(before)
        copy.manifest_file.write_bytes(manifest)


def test_last_validation_that_is_not_finite_is_told(tmp_path: Path) -> None:
    log = [*falling({"0": 1e-3}, 10)[:-1], {"step": 10, "eval_loss": None}]
    run = with_log(empty(tmp_path), STAGES, log)
    found = page(run)
    assert "not finitevalidation loss" in found.text
    assert "The validation loss is not finite at step 10." in found.text


def test_score_that_is_not_finite_is_told(copy: Run) -> None:
    file = copy.eval / "tuned.json"
    before, manifest = file.read_bytes(), copy.manifest_file.read_bytes()
    value = json.loads(before)
    value["results"]["held_out"]["metrics"]["loss"]["value"] = None
    try:
        store(copy, file, value)
        assert any("not finite" in cells for cells in page(copy).rows)
    finally:
        file.write_bytes(before)
        copy.manifest_file.write_bytes(manifest)


def test_score_that_one_model_lacks_leaves_its_cell_empty(copy: Run) -> None:
    file = copy.eval / "base.json"
    before, manifest = file.read_bytes(), copy.manifest_file.read_bytes()
    value = json.loads(before)
    del value["results"]["held_out"]["metrics"]["exact_match"]
    try:
        store(copy, file, value)
        rows = {cells[0]: cells for cells in reversed(page(copy).rows)}
        head, base = rows["model"], rows["base, zero-shot"]
        assert base[head.index("exact match")] == ""
        assert base[head.index("n")] == rows["tuned"][head.index("n")] == "23"
    finally:
        file.write_bytes(before)
        copy.manifest_file.write_bytes(manifest)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_run_with_few_steps_and_no_validation_has_a_page(tmp_path: Path, steps: int) -> None:
    log = [{"step": step, "loss": 1.0, "lr": {"0": 1e-3}} for step in range(1, steps + 1)]
    run = with_log(empty(tmp_path), STAGES, log)
    found = page(run)
    assert len(found.all("figure", **{"class": "drawn"})) == (2 if steps else 0)
    assert ("No training step is in the log yet." in found.text) == (steps == 0)
    assert headings(run.report_file.read_text())[:4] == [
        "Base and tuned",
        "Loss",
        "What trained when",
        "Learning rate by distance",
    ]


def test_validation_without_a_training_step_has_a_page(tmp_path: Path) -> None:
    found = page(with_log(empty(tmp_path), STAGES, [{"step": 0, "eval_loss": 2.0}]))
    assert "Validation loss: 2 at step 0." in found.text


def test_killed_run_says_how_far_it_came(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), STAGES, falling({"0": 1e-3}, 13))
    run.log_file.write_text(run.log_file.read_text()[:-30])
    found = page(run)
    assert "not yet: step 12 of 40 is the last one in the log" in found.text
    assert f"llmtune run {run.path}" in found.text


def test_warnings_of_training_are_on_the_page(tmp_path: Path) -> None:
    log = [*falling({"0": 1e-3}, 2), {"step": 1, "warning": "the loss rises"}, {"step": 2, "warning": "the loss rises"}]
    assert page(with_log(empty(tmp_path), STAGES, log)).text.count("the loss rises") == 1
