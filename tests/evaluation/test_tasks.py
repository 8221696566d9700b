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
from llmtune.evaluation import tasks as tasks_module
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.tasks import load_tasks
from tests.support import tiny
from tests.support.suites import HARNESS, load, mine

COPA = {"premise": "It rained.", "choice1": "The street got wet.", "choice2": "The sun rose.", "question": "effect"}
CHOICES = {"text": ["ice", "steam", "sand", "wood"], "label": ["A", "B", "C", "D"]}
PUBLIC: dict[str, dict[str, Any]] = {
    "arc_easy": {"question": "What does water become when it freezes?", "choices": CHOICES, "answerKey": "A"},
    "piqa": {"goal": "Dry a wet floor.", "sol1": "Use a mop.", "sol2": "Use a hammer.", "label": 0},
    "boolq": {"passage": "Ice is frozen water.", "question": "is ice made of water", "label": 1},
    "copa": COPA | {"label": 0},
}
"""A row of each public task, with the columns of its data set."""


@pytest.fixture(autouse=True)
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index a few of lm-eval's folders: the whole index takes some ten seconds."""
    folders = [str(HARNESS / name) for name in ("arc", "piqa", "super_glue", "humaneval")]
    monkeypatch.setattr(tasks_module, "TaskManager", lambda include_defaults: TaskManager(None, folders, False))


def from_suite(folder: Path, text: str) -> list[Task]:
    """Load the lm-eval tasks of a suite file with this text."""
    return load_tasks(load(folder, text))


def test_runs_task_file_on_local_rows(tmp_path: Path) -> None:
    results = score_tasks(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path)))["mine"]
    assert (results["n"], results["of"], results["limit"], results["truncated"]) == (4, 4, None, 0)
    assert results["metrics"]["acc"]["value"] == sum(score or 0 for score in results["scores"]["acc"]) / 4
    assert results["metrics"]["acc"]["stderr"] is not None
    results = score_tasks(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path)), limit=3)["mine"]
    assert (results["n"], results["of"], results["limit"]) == (3, 4, 3)


def test_keeps_scores_of_every_filter(tmp_path: Path) -> None:
    more: dict[str, Any] = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{a}}"}
    more |= {"generation_kwargs": {"until": ["?"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "none")]
    results = score_tasks(
        tiny.model(), tiny.tokenizer(), from_suite(tmp_path, mine(tmp_path, **more, filter_list=filters))
    )["mine"]
    assert set(results["metrics"]) == set(results["scores"]) == {"exact_match", "exact_match:strict"}
    assert len(results["scores"]["exact_match:strict"]) == 4


BAD_FILTER = {"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric_list": [{"metric": "./evil.py"}]}, "metric './evil.py' is not one of lm-eval's"),
        ({"metric_list": [{"metric": "exact_mach"}]}, "did you mean 'exact_match'?"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "no such file: gone.jsonl"),
        ({"test_split": "train"}, "lm-eval cannot load task.yaml"),
        ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
        ({"task": None}, "names no task"),
        ({"metric_list": [{"metric": "likelihood"}]}, "mine: cannot be scored: TypeError: "),
        ({"metric_list": [{"metric": "bypass"}]}, "mine: gives no score; give it a metric_list"),
        ({"filter_list": [BAD_FILTER]}, "mine: cannot be scored: error: missing ), unterminated subpattern"),
    ],
)
def test_refuses_bad_task_file_in_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        from_suite(tmp_path, mine(tmp_path, **keys))
    assert message in str(raised.value)
    assert "suite.yaml:1: tasks.0: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl: is empty"),
        ('{"q": "a", "a": 1}\n{"q": ', "lm-eval cannot load task.yaml: ArrowInvalid: JSON parse error"),
        ('{"q": "a", "a": 1}\n{"q": "b", "a": 7}\n', "mine: row 2: its answer '7' is none of its 2 choices"),
        ('{"q": "a", "a": 1}\n{"x": "b"}\n', "mine: row 2: its answer 'None' is none of its 2 choices"),
        (
            '{"q": "a", "a": "yes"}\n{"q": "b", "a": "perhaps"}\n',
            "row 2: its answer 'perhaps' is none of its 2 choices",
        ),
        ('{"q": "a", "a": [0, 1]}\n{"q": "b", "a": [0, 2]}\n', "row 2: its answer '[0, 2]' is none of its 2 choices"),
    ],
)
def test_refuses_rows_that_cannot_be_scored_and_names_the_first(tmp_path: Path, content: str, message: str) -> None:
    text = mine(tmp_path)
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(RecipeError) as raised:
        from_suite(tmp_path, text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_accepts_answers_as_places_texts_and_lists(tmp_path: Path) -> None:
    for answers in ([0, 1], ["no", "yes"], [[0], [0, 1]]):
        rows = [{"q": f"q{place}", "a": answer} for place, answer in enumerate(answers)]
        text = mine(tmp_path)
        tiny.write_rows(tmp_path / "rows.jsonl", rows)
        (task,) = from_suite(tmp_path, text)
        assert len(task.eval_docs) == 2


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def test_refuses_template_that_reaches_python(tmp_path: Path) -> None:
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


def test_runs_lm_eval_task_on_local_rows(tmp_path: Path) -> None:
    rows = tmp_path / "copa.jsonl.gz"
    with gzip.open(rows, "wt") as file:
        file.writelines(json.dumps(COPA | {"label": n % 2}) + "\n" for n in range(3))
    (task,) = from_suite(tmp_path, f"tasks: [{{task: copa, rows: {rows}}}]")
    results = score_tasks(tiny.model(), tiny.tokenizer(), [task])["copa"]
    assert (results["n"], results["version"], results["shots"]) == (3, 1.0, 0)
    assert task.instances[0].args == ("It rained therefore", "  the street got wet.")


def test_refuses_local_rows_for_group_of_tasks(tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [COPA])
    with pytest.raises(RecipeError, match="'super-glue-lm-eval-v1' is a group of tasks; name one of them"):
        from_suite(tmp_path, f"tasks: [{{task: super-glue-lm-eval-v1, rows: {rows}}}]")


def test_refuses_public_task_without_network(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as raised:
        from_suite(tmp_path, "tasks: [held_out, arc_easy]")
    assert "arc_easy needs its rows from the Hub, which cannot be reached" in str(raised.value)
    assert "{task: arc_easy, rows: FILE}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_refuses_unknown_task_and_names_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suite.yaml:1: tasks.0: 'arc_esy' .* did you mean 'arc_easy'\?"):
        from_suite(tmp_path, "tasks: [arc_esy]")


def test_skips_index_for_held_out_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "TaskManager", None)
    assert from_suite(tmp_path, "tasks: [held_out]") == []


def public_rows(folder: Path, name: str, count: int) -> Path:
    """Write a file of rows of a public task; BoolQ's is compressed."""
    rows = tiny.write_rows(folder / f"{name}.jsonl", [PUBLIC[name]] * count)
    if name != "boolq":
        return rows
    packed = rows.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    return packed


def public_suite(folder: Path) -> str:
    """Write a suite of four public tasks on local files of three to six rows."""
    files = {name: public_rows(folder, name, count) for count, name in enumerate(PUBLIC, 3)}
    return "tasks:\n" + "".join(f"- {{task: {name}, rows: {file}}}\n" for name, file in files.items())


def test_task_file_includes_one_of_lm_eval_and_changes_its_rows(tmp_path: Path) -> None:
    rows = public_rows(tmp_path, "arc_easy", 4)
    lines = ["task: arc_here", f"include: {HARNESS / 'arc/arc_easy.yaml'}", "dataset_path: json", "dataset_name: null"]
    lines += [f"dataset_kwargs: {{data_files: {{test: {rows}}}}}", "training_split: null", "validation_split: null"]
    (tmp_path / "arc_here.yaml").write_text("\n".join(lines))
    results = score_tasks(tiny.model(), tiny.tokenizer(), from_suite(tmp_path, "tasks: [arc_here.yaml]"), limit=3)
    assert (results["arc_here"]["n"], results["arc_here"]["of"]) == (3, 4)
    assert set(results["arc_here"]["metrics"]) == {"acc", "acc_norm"}


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        (
            "{task: copa, rows: copa.jsonl}, {task: copa, rows: copa.jsonl}",
            "mine",
            "tasks.1: copa is the name of tasks.0",
        ),
        (
            "task.yaml, other.yaml",
            "mine",
            "tasks.1: mine is the name of tasks.0 already; leave one out, or rename the task",
        ),
        ("held_out, task.yaml", "held_out", "tasks.1: held_out is the name of a part of llmtune's own"),
        ("task.yaml", "general_texts", "tasks.0: general_texts is the name of a part of llmtune's own"),
    ],
)
def test_refuses_a_task_whose_name_is_taken(tmp_path: Path, entries: str, name: str, message: str) -> None:
    mine(tmp_path, task=name)
    (tmp_path / "other.yaml").write_bytes((tmp_path / "task.yaml").read_bytes())
    public_rows(tmp_path, "copa", 3)
    with pytest.raises(RecipeError) as raised:
        from_suite(tmp_path, f"tasks: [{entries}]")
    assert f"suite.yaml:1: {message}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_whole_index_knows_the_tasks_of_the_standard_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "TaskManager", TaskManager)
    assert [task.task_name for task in from_suite(tmp_path, public_suite(tmp_path))] == list(PUBLIC)
