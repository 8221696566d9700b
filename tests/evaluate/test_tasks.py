"""lm-eval's tasks from a suite: on local rows, from task files, without a network."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
from jinja2.exceptions import SecurityError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from llmtune.errors import MachineError, RecipeError
from llmtune.evaluate import tasks as tasks_module
from llmtune.evaluate.harness import harness
from llmtune.evaluate.tasks import load_tasks
from tests.support import ROOT, tiny
from tests.support.suites import HARNESS, load, mine

SHARED = ROOT.parent / "shared" / "data" / "eval_suites"
FILES = {
    "arc_easy": "test.jsonl",
    "piqa": "validation.jsonl",
    "boolq": "validation.jsonl.gz",
    "copa": "validation.jsonl",
}
COPA = {"premise": "It rained.", "choice1": "The street got wet.", "choice2": "The sun rose.", "question": "effect"}


@pytest.fixture(autouse=True)
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index a few of lm-eval's folders: the whole index takes some ten seconds."""
    folders = [str(HARNESS / name) for name in ("arc", "piqa", "super_glue", "humaneval")]
    monkeypatch.setattr(tasks_module, "TaskManager", lambda include_defaults: TaskManager(None, folders, False))


def from_suite(folder: Path, text: str) -> list[Task]:
    """The lm-eval tasks of a suite file with this text."""
    return load_tasks(load(folder, text))


def test_a_task_file_on_local_rows_is_asked(tmp_path: Path) -> None:
    found = harness(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path)))["mine"]
    assert (found["n"], found["of"], found["limit"], found["truncated"]) == (4, 4, None, 0)
    assert found["metrics"]["acc"]["value"] == sum(found["scores"]["acc"]) / 4
    assert found["metrics"]["acc"]["stderr"] is not None
    found = harness(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path)), limit=3)["mine"]
    assert (found["n"], found["of"], found["limit"]) == (3, 4, 3)


def test_every_filter_of_a_task_keeps_its_own_scores(tmp_path: Path) -> None:
    more = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{a}}"}
    more |= {"generation_kwargs": {"until": ["?"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "none")]
    found = harness(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path, **more, filter_list=filters)))[
        "mine"
    ]
    assert set(found["metrics"]) == set(found["scores"]) == {"exact_match", "exact_match:strict"}
    assert len(found["scores"]["exact_match:strict"]) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric_list": [{"metric": "./evil.py"}]}, "metric './evil.py' is none of lm-eval's"),
        ({"metric_list": [{"metric": "exact_mach"}]}, "did you mean 'exact_match'?"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "no such file: gone.jsonl"),
        ({"test_split": "train"}, "lm-eval cannot load task.yaml"),
        ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        ({"task": None}, "names no task"),
    ],
)
def test_what_lm_eval_cannot_load_is_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        from_suite(tmp_path, mine(tmp_path, **keys))
    assert message in str(raised.value)
    assert "suite.yaml:1: tasks.0: " in str(raised.value)
    assert "\n" not in str(raised.value)


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unsafe"):
        from_suite(tmp_path, mine(tmp_path, doc_to_text=ESCAPE))


def test_lm_eval_renders_every_template_in_the_sandbox() -> None:
    with pytest.raises(SecurityError):
        lm_eval.utils.apply_template(ESCAPE, {})
    package = Path(lm_eval.__file__).parent
    sources = {file.relative_to(package).as_posix(): file.read_text() for file in package.glob("**/*.py")}
    makes = {name for name, text in sources.items() if re.search(r"\b(Environment|Template)\(", text)}
    assert {name for name in makes if not re.match(r"tasks/[a-z]\w*/", name)} == {"utils.py"}
    assert len(re.findall(r"\bEnvironment\(", sources["utils.py"])) == 1
    assert "jinja2" not in sources["api/task.py"], "lm-eval renders elsewhere than in utils.apply_template"


def test_a_task_of_the_harness_takes_local_rows(tmp_path: Path) -> None:
    rows = tmp_path / "copa.jsonl.gz"
    with gzip.open(rows, "wt") as file:
        file.writelines(json.dumps(COPA | {"label": n % 2}) + "\n" for n in range(3))
    (task,) = from_suite(tmp_path, f"tasks: [{{task: copa, rows: {rows}}}]")
    found = harness(tiny.model(), tiny.tokenizer(), [task])["copa"]
    assert (found["n"], found["version"], found["shots"]) == (3, 1.0, 0)
    assert task.instances[0].args == ("It rained therefore", "  the street got wet.")


def test_a_group_of_tasks_takes_no_local_rows(tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [COPA])
    with pytest.raises(RecipeError, match="'super-glue-lm-eval-v1' is a group of tasks; name one of them"):
        from_suite(tmp_path, f"tasks: [{{task: super-glue-lm-eval-v1, rows: {rows}}}]")


def test_a_public_task_without_a_network_is_one_line_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as raised:
        from_suite(tmp_path, "tasks: [held_out, arc_easy]")
    assert "arc_easy needs its rows from the Hub, which cannot be reached" in str(raised.value)
    assert "{task: arc_easy, rows: FILE}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_task_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suite.yaml:1: tasks.0: 'arc_esy' .* did you mean 'arc_easy'\?"):
        from_suite(tmp_path, "tasks: [arc_esy]")


def test_held_out_rows_alone_need_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "TaskManager", None)
    assert from_suite(tmp_path, "tasks: [held_out]") == []


def needs_shared() -> None:
    """Skip where the public sets are not beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the public evaluation sets in {SHARED}")


def local_suite() -> str:
    """A suite of four public tasks on local files."""
    return "tasks:\n" + "".join(f"- {{task: {name}, rows: {SHARED / name / file}}}\n" for name, file in FILES.items())


def test_four_public_tasks_run_on_local_files(tmp_path: Path) -> None:
    needs_shared()
    wide = tiny.model(max_position_embeddings=2048)
    found = harness(wide, tiny.tokenizer(), from_suite(tmp_path, local_suite()), limit=2)
    assert {name: (one["n"], one["of"], one["truncated"]) for name, one in found.items()} == {
        "arc_easy": (2, 2376, 0),
        "piqa": (2, 1838, 0),
        "boolq": (2, 3270, 0),
        "copa": (2, 100, 0),
    }


def test_a_task_file_may_include_the_harness_own_and_change_its_rows(tmp_path: Path) -> None:
    needs_shared()
    lines = ["task: arc_here", f"include: {HARNESS / 'arc/arc_easy.yaml'}", "dataset_path: json", "dataset_name: null"]
    lines += [f"dataset_kwargs: {{data_files: {{test: {SHARED / 'arc_easy/test.jsonl'}}}}}"]
    lines += ["training_split: null", "validation_split: null"]
    (tmp_path / "arc_here.yaml").write_text("\n".join(lines))
    found = harness(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, "tasks: [arc_here.yaml]"), limit=3)
    assert found["arc_here"]["n"] == 3
    assert set(found["arc_here"]["metrics"]) == {"acc", "acc_norm"}


@pytest.mark.slow
def test_the_whole_index_knows_the_tasks_of_the_standard_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "TaskManager", TaskManager)
    needs_shared()
    assert [task.task_name for task in from_suite(tmp_path, local_suite())] == list(FILES)
