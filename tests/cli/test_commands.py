"""The commands: each mistake is one line with its exit code, and light commands answer without torch."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from llmtune import recipe
from llmtune.cli import main
from llmtune.errors import ProofError
from llmtune.evaluation import tasks as tasks_module
from llmtune.launch import process
from llmtune.launch.ending import Exit
from llmtune.launch.process import EXIT_FILE
from llmtune.recipe.suite import Suite, load_suite
from llmtune.training import process as training_process
from llmtune.training.prepare import prepare
from tests.support import tiny
from tests.support.suites import HARNESS


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with a tiny base and rows."""
    tiny.save_base(tmp_path / "base", blocks=2)
    tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(20))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the training in this process, which saves its start-up; it ends before it loads weights."""

    def start(settings: Any, words: list[str]) -> Exit:
        with tempfile.TemporaryDirectory() as folder:
            monkeypatch.setenv(EXIT_FILE, f"{folder}/code")
            code = training_process.main(words)
            return Exit(code, Path(folder, "code").read_text().partition("\n")[2] if code else "")

    monkeypatch.setattr(process, "run_training", start)
    monkeypatch.setattr(training_process, "train", lambda *_: pytest.fail("it trains"))


def write_recipe(place: Path, **sections: Any) -> str:
    """Write a recipe with those sections and return its path."""
    method = sections.pop("method", None)
    return str(tiny.write_recipe(place / "r.yaml", place / "base", place / "train.jsonl", method, **sections))


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Return the one line that a failing command writes."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("llmtune: ")
    assert "Traceback" not in lines[0]
    return lines[0]


RECIPES = {
    "no YAML": ("a: [1", "not YAML"),
    "empty": ("", "is empty"),
    "too large": ("#" * (1 << 20) + "\nmodel: x", "a recipe may have at most 1048576"),
    "python object": ("model: !!python/object/apply:os.system ['touch owned']", "is not allowed"),
    "unknown key": ("modle: {base: x}", "did you mean 'model'"),
}


@pytest.mark.parametrize("command", ["check", "plan", "run"])
@pytest.mark.parametrize("kind", RECIPES)
def test_refuses_bad_recipe_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    text, message = RECIPES[kind]
    (place / "bad.yaml").write_text(text)
    line = refusal(capsys, [command, "bad.yaml"], 2)
    assert message in line
    assert "bad.yaml" in line
    assert not (place / "owned").exists()
    assert not (place / "runs").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({"model": {"base": "no where"}}, 2, "model.base: no file or folder no where (looked for "),
        ({"model": {"base": "someone/model"}}, 3, "the Hub cannot be reached"),
        ({"data": {"train": "gone.jsonl"}}, 2, "gone.jsonl"),
        ({"data": {"train": "empty.jsonl"}}, 2, "empty"),
        ({"data": {"train": "broken.jsonl"}}, 2, "broken.jsonl:2"),
        ({"data": {"train": "columns.jsonl"}}, 2, "data.map: {prompt: question, completion: answer}"),
        ({"data": {"train": "train.jsonl", "max_length": 8}}, 2, "longer than max_length 8"),
        ({"method": {"kind": "frozen", "reach": 9}}, 2, "beyond the model"),
        ({"method": {"kind": "gradual", "reaches": [1, 9]}}, 2, "beyond the model"),
        ({"model": {"base": "base", "quantize": "4bit"}}, 2, "4bit"),
        ({"method": {"kind": "full"}, "train": {"batch_size": 4, "micro_batch_size": 3}}, 2, "does not divide"),
        (
            {"method": {"kind": "gradual", "reaches": [0, 1, "all"]}, "train": {"max_steps": 2}},
            2,
            "cannot hold 3 stages",
        ),
        ({"eval": {"suite": "quik"}}, 2, "eval.suite: 'quik' is not one of"),
        ({"eval": {"suite": "suite.yaml"}}, 2, "suite.yaml:2: tasks.1: no such file"),
        ({"eval": {"suite": "alone.yaml"}}, 2, "mine.yaml: no such file: no.jsonl"),
        ({"eval": {"suite": "quick"}, "data": {"train": "train.jsonl", "eval_fraction": 0}}, 2, "no held-out rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refuses_impossible_recipe_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, sections: dict[str, Any], code: int, message: str
) -> None:
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    tiny.write_rows(place / "columns.jsonl", [{"question": "a", "answer": "b"}])
    (place / "suite.yaml").write_text("tasks: [held_out,\n gone.yaml]")
    (place / "alone.yaml").write_text("tasks: [mine.yaml]")
    (place / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: no.jsonl}}\n")
    line = refusal(capsys, [command, write_recipe(place, **sections)], code)
    assert message in line
    assert not (place / "runs" / "r" / "delta").exists()


@pytest.mark.usefixtures("here")
def test_refuses_public_task_without_network_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(HARNESS / "arc")]  # the whole index takes some ten seconds
    monkeypatch.setattr(tasks_module, "TaskManager", lambda include_defaults: TaskManager(None, folders, False))
    line = refusal(capsys, ["run", write_recipe(place, eval={"suite": "standard"})], 3)
    assert "standard.yaml:4: tasks.1: arc_easy needs its rows from the Hub, which cannot be reached" in line
    assert not (place / "runs" / "r" / "recipe.yaml").exists()


def test_resolves_suite_file_to_absolute_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "suite.yaml").write_text("tasks: [held_out]")
    for name, expected in (("suite.yaml", str(place / "suite.yaml")), ("quick", "quick"), ("none", "none")):
        file = Path(write_recipe(place, eval={"suite": name}))
        resolved = prepare(recipe.load(file), place / name.removesuffix(".yaml"), gpus=0).recipe()
        assert resolved.eval.suite == expected
        monkeypatch.chdir(place / "base")
        assert name == "none" or load_suite(resolved.eval.suite).tasks == ("held_out",)
        monkeypatch.chdir(place)


def test_loads_lm_eval_tasks_only_if_suite_has_some(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Suite] = []
    monkeypatch.setattr(tasks_module, "load_tasks", loaded.append)
    assert main(["check", write_recipe(place, eval={"suite": "quick"})]) == 0
    assert loaded == []
    assert main(["check", write_recipe(place, eval={"suite": "orders"})]) == 0
    assert [one.tasks for one in loaded] == [("orders",)]


@pytest.mark.usefixtures("here")
def test_refuses_folder_of_somebody_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "r").mkdir(parents=True)
    (place / "runs" / "r" / "thesis.txt").write_text("mine")
    assert "holds no run" in refusal(capsys, ["run", write_recipe(place)], 2)
    assert (place / "runs" / "r" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["eval", "merge", "export", "publish", "report", "chat"])
def test_refuses_step_without_run(place: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    to = ["--to", "gguf"] if command == "export" else []
    assert "holds no run" in refusal(capsys, [command, "nowhere", *to], 2)
    assert "no such file" in refusal(capsys, ["train", "nowhere"], 2)
    assert "holds no run" in refusal(capsys, ["train", "base"], 2)
    file = write_recipe(place)
    assert "is a recipe; give the folder of its run, such as runs/" in refusal(capsys, [command, file, *to], 2)


def test_check_and_plan_print_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(place, method={"kind": "gradual", "reaches": [1, "all"], "lr": 0.01})
    assert main(["check", recipe, "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["data"]["rows"]["train"] + checked["data"]["rows"]["eval"] == 20
    assert main(["plan", recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["trains"] for stage in plan["stages"]] == [{"kind": "top", "reach": 1}, {"kind": "everything"}]
    assert plan["trained"] == plan["parameters"]
    assert not (place / "runs").exists()


def test_help_and_recipe_errors_import_no_torch(place: Path) -> None:
    (place / "bad.yaml").write_text("modle: 1")
    code = "import sys\nfrom llmtune.cli import main\n"
    for arguments in (["--help"], ["check", "bad.yaml"]):
        code += f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        code += f"assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules), {arguments}\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_run_completes_every_step_and_trains_once(place: Path) -> None:
    recipe = write_recipe(
        place,
        method={"kind": "gradual", "reaches": [1, "all"], "lr": 0.01},
        eval={"suite": "quick", "shots": 2},
        merge={"dtype": "float32"},
    )
    command = [sys.executable, "-m", "llmtune", "run", recipe]
    first = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    run = place / "runs" / "r"
    for name in ("recipe.yaml", "plan.json", "data.json", "log.jsonl", "manifest.json", "report.html"):
        assert (run / name).is_file(), name
    for name in ("delta", "merged", "eval", "checkpoints"):
        assert any((run / name).iterdir()), name
    assert "exact match" in first.stdout
    began = time.time()
    again = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (run / "delta" / "trained.safetensors").stat().st_mtime < began


@pytest.mark.slow
def test_refuses_bad_recipe_in_one_line_with_several_processes(place: Path) -> None:
    data = {"train": "train.jsonl", "max_length": 8}
    recipe = write_recipe(place, data=data, launch={"accelerate": "multi_cpu", "processes": 2})
    command = [sys.executable, "-m", "llmtune", "run", recipe]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("llmtune: ")
    assert "data.max_length: all 19 train rows are longer than max_length 8" in ended.stderr


AFTER_TRAINING = ["llmtune.evaluation.step.evaluate", "llmtune.merging.step.merge", "llmtune.reporting.page.report"]


@pytest.mark.parametrize("place_of_failure", range(3))
def test_failed_step_ends_the_run_and_says_that_the_delta_is_safe(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place_of_failure: int
) -> None:
    done: list[int] = []

    def step(number: int) -> None:
        if number == place_of_failure:
            raise ProofError("no proof")
        done.append(number)

    run = prepare(recipe.load(Path(write_recipe(place, eval={"suite": "quick"}))), place / "run", gpus=0)
    run.delta.mkdir()
    (run.delta / "base.json").write_text("{}")
    run.mark("train", [run.delta])
    for number, name in enumerate(AFTER_TRAINING):
        monkeypatch.setattr(name, lambda run, number=number: step(number))
    assert main(["run", str(run.path)]) == ProofError.exit_code
    assert capsys.readouterr().err.splitlines() == [
        f"llmtune: training is safe in {run.delta}; continue with: llmtune run {run.path}",
        "llmtune: no proof",
    ]
    assert done == list(range(place_of_failure))


def test_chat_refuses_a_delta_that_is_not_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare(recipe.load(Path(write_recipe(place))), place / "run", gpus=0)
    run.delta.mkdir()
    (run.delta / "trained.safetensors").write_bytes(b"12345678")
    run.mark("train", [run.delta])
    (run.delta / "trained.safetensors").write_bytes(b"1234")
    assert main(["chat", str(run.path)]) == 4
    assert capsys.readouterr().err == f"llmtune: {run.path}: nothing is trained yet; first: llmtune train {run.path}\n"
