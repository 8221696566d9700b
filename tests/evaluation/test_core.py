"""Public tasks and groups of tasks: lm-eval's own figures, and what local rows and packages they need."""

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmtune.errors import MachineError, RecipeError
from llmtune.evaluation import tasks as tasks_module
from llmtune.evaluation.groups.scores import group_result
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.results import Result, compare_results
from llmtune.evaluation.tables import compare_models, compare_tasks
from llmtune.evaluation.tasks import load_tasks_and_groups
from tests.support import tiny
from tests.support.suites import HARNESS, load

SEEN = ["ice", "steam", "sand", "wood", "iron", "clay"]
CHOICES = {"text": SEEN[:4], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": f"What is like {one}?", "choices": CHOICES, "answerKey": "ABCDAB"[n]} for n, one in enumerate(SEEN)
    ],
    "piqa": [
        {"goal": f"Move {one}.", "sol1": "Push it.", "sol2": f"Eat {one}.", "label": n % 2}
        for n, one in enumerate(SEEN)
    ],
    "boolq": [{"passage": f"{one} is dry.", "question": f"is {one} dry", "label": n % 2} for n, one in enumerate(SEEN)],
    "winogrande": [
        {"sentence": f"The {one} broke since the _ fell.", "option1": one, "option2": "cup", "answer": "12"[n % 2]}
        for n, one in enumerate(SEEN)
    ],
    "gsm8k": [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(2)],
    "pair_first": [{"question": f"Is {one} wet?", "choices": CHOICES, "answerKey": "A"} for one in SEEN[:2]],
    "pair_second": [
        {"question": f"Is {one} old?", "choices": CHOICES, "answerKey": "BBCDA"[n]} for n, one in enumerate(SEEN[:5])
    ],
}
EXAMPLES = [{"question": f"{n}+2?", "answer": f"#### {n + 2}"} for n in range(6)]
FILES = {
    "arc_easy": "arc/arc_easy",
    "piqa": "piqa/piqa",
    "boolq": "super_glue/boolq/default",
    "winogrande": "winogrande/default",
    "gsm8k": "gsm8k/gsm8k",
    "pair_first": "arc/arc_easy",
    "pair_second": "arc/arc_easy",
}


def pair(folder: Path, by_size: bool = True) -> Path:
    """Write an index with a group of two tasks."""
    folder.mkdir(exist_ok=True)
    metrics = [{"metric": name, "weight_by_size": by_size} for name in ("acc", "acc_norm")]
    group = {"group": "pair", "task": ["pair_first", "pair_second"], "aggregate_metric_list": metrics}
    (folder / "pair.yaml").write_text(yaml.safe_dump(group))
    for name in group["task"]:
        (folder / f"{name}.yaml").write_text(f"include: {HARNESS / 'arc/arc_easy.yaml'}\ntask: {name}\n")
    return folder


@pytest.fixture(autouse=True)
def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index a few of lm-eval's folders and a group: the whole index takes some ten seconds."""
    folders = [str(HARNESS / name) for name in ("arc", "piqa", "super_glue", "winogrande", "gsm8k", "ifeval")]
    folders.append(str(pair(tmp_path / "index")))
    monkeypatch.setattr(tasks_module, "TaskManager", lambda include_defaults: TaskManager(None, folders, False))


def written(folder: Path) -> dict[str, Path]:
    """Write the rows of every task; one file is compressed, and those of the group's tasks have a folder."""
    (folder / "pair").mkdir()
    files = {
        name: tiny.write_rows(folder / ("pair" if name.startswith("pair") else "") / f"{name}.jsonl", rows)
        for name, rows in ROWS.items()
    }
    (folder / "pair" / "pair_second.jsonl.gz").write_bytes(gzip.compress(files["pair_second"].read_bytes()))
    files.pop("pair_second").unlink()
    return files | {"pair_second": folder / "pair" / "pair_second.jsonl.gz"}


def suite_text(folder: Path) -> str:
    """Write a suite of five tasks and a group on local rows, with worked examples for one."""
    files = written(folder)
    entries: list[dict[str, str]] = [{"task": name, "rows": str(files[name])} for name in list(ROWS)[:5]]
    entries[4]["examples"] = str(tiny.write_rows(folder / "examples.jsonl", EXAMPLES))
    return yaml.safe_dump({"tasks": [*entries, {"task": "pair", "rows": str(folder / "pair")}]})


def of_lm_eval(folder: Path, model: Any) -> dict[str, dict[str, Any]]:
    """Score a model by lm-eval alone: its own task files over the same rows, each with its own number of examples."""
    index = pair(folder / "plain")
    for name, file in FILES.items():
        group = "pair" if name.startswith("pair") else ""
        rows = folder / group / f"{name}.jsonl{'.gz' if name == 'pair_second' else ''}"
        test = "validation" if name in ("piqa", "boolq", "winogrande") else "test"
        data = {test: str(rows)} | ({"train": str(folder / "examples.jsonl")} if name == "gsm8k" else {})
        lines = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
        lines |= {
            f"{split}_split": None
            for split in ("training", "validation", "test")
            if f"{split}_split" != f"{test}_split"
        }
        (index / f"{name}.yaml").write_text(f"include: {HARNESS / file}.yaml\n{yaml.safe_dump(lines)}")
    loaded = TaskManager(None, [str(index)], False).load([*list(ROWS)[:5], "pair"])
    for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(1234)
    lm = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=8)
    answers = evaluate(lm, loaded, bootstrap_iters=2)
    return answers["results"] | answers["groups"]


def test_figures_equal_lm_evals_to_the_last_digit(tmp_path: Path) -> None:
    tasks, (group,) = load_tasks_and_groups(load(tmp_path, suite_text(tmp_path)))
    model = tiny.model(seed=3, initializer_range=0.3).eval()
    results: dict[str, Result] = score_tasks(model, tiny.tokenizer(), tasks)
    results["pair"] = group_result(group, results)
    plain = of_lm_eval(tmp_path, model)
    assert results["gsm8k"]["shots"] == 5, "the task's own number"
    assert set(results) == {*ROWS, "pair"}
    for name, result in results.items():
        for title, score in result["metrics"].items():
            metric, _, kind = title.partition(":")
            key, error = f"{metric},{kind or 'none'}", f"{metric}_stderr,{kind or 'none'}"
            assert (score["value"], score["stderr"]) == (plain[name][key], plain[name][error]), (name, title)
    assert len({results[name]["metrics"]["acc"]["value"] for name in ("pair_first", "pair_second", "pair")}) == 3


@pytest.mark.parametrize("by_size", [True, False])
def test_group_is_compared_on_the_rows_of_its_tasks(tmp_path: Path, by_size: bool) -> None:
    pair(tmp_path / "index", by_size)
    written(tmp_path)
    tasks, (group,) = load_tasks_and_groups(load(tmp_path, f"tasks: [{{task: pair, rows: {tmp_path / 'pair'}}}]"))
    results = [
        score_tasks(tiny.model(seed=seed, initializer_range=0.3).eval(), tiny.tokenizer(), tasks) for seed in (3, 4)
    ]
    totals = [group_result(group, one) for one in results]
    values = [one["metrics"]["acc"]["value"] or 0 for one in totals]
    means = [[one[name]["metrics"]["acc"]["value"] or 0 for name in ("pair_first", "pair_second")] for one in results]
    weights = (2 / 7, 5 / 7) if by_size else (0.5, 0.5)
    assert values == pytest.approx([sum(a * b for a, b in zip(one, weights, strict=True)) for one in means])
    gap = compare_results(totals[1], totals[0])["acc"]
    assert gap["n"] == 7
    assert gap["difference"] == pytest.approx(values[1] - values[0])
    assert ("won" in gap) == by_size, "McNemar's test is for 0/1 scores"


def test_a_group_stands_for_its_tasks_and_many_tasks_have_a_table() -> None:
    def result(**more: Any) -> Any:
        return {"n": 3, "of": 3, "shots": 0, "metrics": {"acc": {"value": 0.5, "stderr": None, "n": 3}}, **more}

    many = {name: result() for name in "abcde"} | {"part": result(group="a")}
    held_out = {"held_out": result(metrics={"loss": {"value": 1.0, "stderr": None, "n": 3}})}
    assert [row["task"] for row in compare_models(many, many)] == [*"abcde"]
    assert list(compare_models(held_out | many, held_out | many)[0]) == ["model", "loss", "n"]
    shown = compare_tasks(held_out | many, held_out | many)
    assert shown[0] == {"task": "a", "base, zero-shot": "acc 0.500 (n 3)", "tuned": "acc 0.500 (n 3)"}
    assert len(shown) == 5


def test_refuses_a_task_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(MachineError) as raised:
        load_tasks_and_groups(load(tmp_path, "tasks: [ifeval]"))
    assert str(raised.value).endswith(
        'cannot load ifeval: it needs the Python package langdetect; pip install "lm_eval[ifeval]"'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{task: pair, rows: pair}", "tasks.0: no file {folder}/pair/pair_second.jsonl (or .jsonl.gz, .json, .csv"),
        ("{task: pair, rows: pair/pair_first.jsonl}", "tasks.0.task: 'pair' is a group of tasks; name one of them, or"),
        (
            "{task: arc_easy, rows: pair}",
            "tasks.0.rows: {folder}/pair is a folder, and arc_easy is one task; give a file",
        ),
        ("{task: gsm8k, rows: a.jsonl, examples: b.jsonl}", "tasks.0.examples: no such file: {folder}/b.jsonl"),
        ("{task: gsm8k, rows: a.jsonl, examples: c.csv}", "tasks.0.examples: is of another format than rows"),
    ],
)
def test_refuses_local_rows_that_do_not_fit_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pair").mkdir()
    for name in ("pair/pair_first.jsonl", "a.jsonl"):
        tiny.write_rows(tmp_path / name, ROWS["pair_first"])
    (tmp_path / "c.csv").write_text("question,answer\n1,2\n")
    with pytest.raises(RecipeError) as raised:
        load_tasks_and_groups(load(tmp_path, f"tasks: [{text}]"))
    assert message.format(folder=tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
