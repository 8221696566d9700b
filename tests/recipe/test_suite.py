"""Suites and task files: what they may contain, and that none of them contains code."""

from pathlib import Path

import pytest

from llmtune.errors import RecipeError
from llmtune.files import shipped_folder
from tests.support.suites import HARNESS, load, named


@pytest.mark.parametrize("file", sorted(shipped_folder("eval").glob("*.yaml")), ids=lambda file: file.stem)
def test_loads_every_shipped_suite_by_name(tmp_path: Path, file: Path) -> None:
    suite = named(tmp_path, file.stem)
    assert suite.tasks
    assert suite.path == file.absolute()


def test_ships_four_suites() -> None:
    names = sorted(file.stem for file in shipped_folder("eval").glob("*.yaml"))
    assert names == ["core", "orders", "quick", "standard"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [held_out]\nlimits: 3", "suite.yaml:2: limits: unknown key; did you mean 'limit'?"),
        ("tasks: [held_out]\nlimit: 0", "suite.yaml:2: limit: a number >= 1 is expected, got 0"),
        ("tasks: []", "suite.yaml:1: tasks: a list of at least 1 is expected"),
        ("limit: 3", "suite.yaml:1: tasks: is missing"),
        ("tasks:\n- held_out\n- {task: piqa, row: x}", "suite.yaml:3: tasks.1.row: unknown key; did you mean 'rows'?"),
        ("tasks:\n- held_out\n- gone.yaml", "suite.yaml:3: tasks.1: no such file"),
        ("tasks:\n- {task: piqa, rows: gone.jsonl}", "suite.yaml:2: tasks.0.rows: no such file"),
        ("tasks:\n- ~nosuchuser/task.yaml", "~nosuchuser/task.yaml: this machine knows no home folder for ~nosuchuser"),
        ("tasks: [{task: piqa, rows: ~nosuchuser/x.jsonl}]", "~nosuchuser/x.jsonl: this machine knows no home folder"),
        ("tasks: [{task: piqa, rows: suite.yaml}]\nshots: 2", "suite.yaml:2: shots: must be 0 with local rows"),
        ("tasks: [!function os.system]", "suite.yaml:1: tasks.0: the tag '!function' is not allowed"),
    ],
)
def test_reports_a_wrong_suite_in_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load(tmp_path, text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_the_nearest_suite(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.json:\d+: eval.suite: 'quik' is not one of .*did you mean 'quick'\?"):
        named(tmp_path, "quik")


def test_refuses_to_load_the_suite_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval.suite: is none, so nothing is evaluated"):
        named(tmp_path, "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("doc_to_text: !function utils.text", "task.yaml:2: doc_to_text: the tag '!function' is not allowed"),
        ("process_docs: !!python/name:os.system", "task.yaml:2: process_docs: the tag"),
        ("class: utils.Task", "task.yaml:2: class: is not allowed in a task file"),
        ("unsafe_code: true", "task.yaml:2: unsafe_code: is not allowed in a task file"),
        (
            "metric_list: [{metric: ./mine, hf_evaluate: true}]",
            "task.yaml:2: metric_list.0.hf_evaluate: is not allowed",
        ),
        ("include: gone.yaml", "task.yaml:2: include: no such file"),
    ],
)
def test_refuses_a_task_file_with_code(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "task.yaml").write_text(f"task: mine\n{line}\n")
    with pytest.raises(RecipeError) as raised:
        load(tmp_path, "tasks: [task.yaml]")
    assert message in str(raised.value)


def test_refuses_code_in_an_included_file(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text("doc_to_text: !function utils.text\n")
    (tmp_path / "task.yaml").write_text("task: mine\ninclude: inner.yaml\n")
    with pytest.raises(RecipeError, match=r"inner.yaml:1: doc_to_text: the tag '!function' is not allowed"):
        load(tmp_path, "tasks: [task.yaml]")


def test_includes_files_of_lm_eval(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(f"task: mine\ninclude: {HARNESS / 'super_glue/copa/default.yaml'}\n")
    assert load(tmp_path, "tasks: [task.yaml]").tasks == ("task.yaml",)


def test_ends_at_files_that_include_each_other(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: mine\ninclude: other.yaml\n")
    (tmp_path / "other.yaml").write_text("include: task.yaml\n")
    assert load(tmp_path, "tasks: [task.yaml]").tasks
