"""Evaluating a run: the trained delta and nothing else, under settings that are written down."""

import copy
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.batches.collate import Collator
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.gate import gate
from llmtune.errors import ProofError, RecipeError
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.results import Result, compare
from llmtune.evaluation.step import evaluate
from llmtune.evaluation.tables import difference_table, table
from llmtune.files import read_json
from llmtune.model.base import load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.reporting.page import render
from llmtune.run import Run
from tests.support import runs, tiny
from tests.support.pages import Page
from tests.support.runs import with_held_out_rows
from tests.support.suites import mine

ANSWERS = [{"id": f"r{n}", "prompt": f"say {n}", "completion": "ok"} for n in range(20)]
DORA = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dora": True}}
IA3 = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "ia3"}}
BOTTLENECK = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "bottleneck", "size": 8}}


def loss(result: Result) -> float:
    """Return a result's loss, which is finite."""
    value = result["metrics"]["loss"]["value"]
    assert value is not None
    return value


def learned(run: Run, steps: int) -> Run:
    """Train a run in a plain loop over its held-out rows; after no step the adapter is still zero."""
    settings = run.recipe()
    base = locate_base(settings.model)
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    weights = load_model(base)
    plan = settings.plan(model_facts(weights))
    torch.manual_seed(0)
    tuned = insert(weights, settings.method.adapter, plan, base)
    tensors = trained_tensors(tuned, plan)
    examples = encode(list(gate(settings, tokenizer, stop).test), tokenizer, stop, Rules(512, "drop")).examples
    batch = Collator(0)([{"input_ids": example.input_ids, "labels": example.labels} for example in examples])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=0.03)
    for _ in range(steps):
        tuned(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_delta(tuned, dict(tensors), run.delta, base, settings.method.adapter.kind)
    run.mark("train", [run.delta])
    return run


def test_trained_adapter_changes_the_score(tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"say {n % 10}{n // 10}"} for n, row in enumerate(ANSWERS)]
    base_folder = tiny.save_base(tmp_path / "base", initializer_range=0.3)
    run = learned(with_held_out_rows(tmp_path, rows, base=base_folder), 30)
    stored = evaluate(run)
    base, tuned = stored["base"]["results"], stored["tuned"]["results"]["held_out"]
    assert base["held_out"]["metrics"]["exact_match"]["value"] == 0.0
    assert base["held_out_few_shot"]["shots"] == 2
    assert tuned["metrics"]["exact_match"] == {"value": 1.0, "stderr": 0.0, "n": 5, "interval": (1.0, 1.0)}
    assert loss(tuned) < 0.2 < loss(base["held_out"])
    assert [row["output"] for row in stored["tuned"]["rows"]] == ["ok"] * 5
    change = stored["tuned"]["differences"]["base, zero-shot"]["held_out"]
    assert (change["exact_match"]["won"], change["exact_match"]["lost"], change["exact_match"]["p"]) == (5, 0, 0.0625)
    assert (change["loss"]["difference"] or 0) < 0
    assert change["loss"]["verdict"] == "too few rows to tell"
    assert [row["model"] for row in table(run)] == ["base, zero-shot", "base, 2-shot", "tuned"]
    assert table(run)[2]["exact match"] == "1.000 ± 0.000"
    assert difference_table(run)[0] == {
        "tuned against": "base, zero-shot",
        "metric": "exact match",
        "difference": "+1.000 ± 0.000",
        "95% interval": "+1.000 to +1.000",
        "verdict": "too few rows to tell",
        "n": "5",
    }
    assert [(row["tuned against"], row["metric"]) for row in difference_table(run)][3] == (
        "base, 2-shot",
        "loss (lower is better)",
    )


def test_zero_adapter_scores_exactly_as_base(tmp_path: Path) -> None:
    stored = evaluate(learned(with_held_out_rows(tmp_path), 0))
    base, tuned = (stored[name]["results"]["held_out"] for name in ("base", "tuned"))
    assert tuned == base
    assert stored["tuned"]["rows"] == stored["base"]["rows"]
    assert stored["tuned"]["differences"]["base, zero-shot"]["held_out"]["loss"]["difference"] == 0


def test_a_base_that_is_not_asked_has_no_answers_and_the_page_says_why(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path, eval={**runs.QUICK, "forgetting": False})
    whole = evaluate(run)
    stored = evaluate(run, unasked="its weights are random")
    assert (stored["base"]["results"], stored["base"]["rows"]) == ({}, [])
    assert stored["tuned"]["results"] == whole["tuned"]["results"]
    assert stored["tuned"]["differences"] == {"base, zero-shot": {}}
    assert read_json(run.eval / "base.json") == stored["base"]
    assert [row["model"] for row in table(run)] == ["tuned"]
    assert "exact match" in table(run)[0]
    shown = Page(render(run)).text
    assert "The base was not asked: its weights are random." in shown


@pytest.mark.parametrize("method", [runs.LORA, DORA, IA3, BOTTLENECK, {"kind": "full", "lr": 1e-3}])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.slow
def test_evaluates_every_kind_of_delta_in_both_precisions(tmp_path: Path, method: Any, precision: str) -> None:
    base = tiny.save_base(tmp_path / "base")
    run = with_held_out_rows(
        tmp_path, method=method, base=base, model={"base": str(base), "precision": precision}, step=0.3
    )
    stored = evaluate(run)
    assert stored["settings"]["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert abs(loss(stored["base"]["results"]["held_out"]) - loss(stored["tuned"]["results"]["held_out"])) > 1e-4


def test_loss_equals_tuned_model_on_held_out_answers(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path, step=0.3)
    stored = evaluate(run)["tuned"]["results"]["held_out"]
    settings = run.recipe()
    base = locate_base(settings.model)
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    tuned = runs.load_tuned(run)
    examples = encode(list(gate(settings, tokenizer, stop).test), tokenizer, stop, Rules(512, "drop")).examples
    expected = answer_losses(tuned, examples, 0)
    assert stored["scores"]["loss"] == pytest.approx(expected, rel=1e-5)
    tokens = sum(example.supervised for example in examples)
    assert stored["metrics"]["loss"]["value"] == pytest.approx(sum(expected) / tokens)


def test_keeps_padded_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(*arguments: Any) -> Any:
        loaded.append(load_model(*arguments))
        return loaded[-1]

    monkeypatch.setattr("llmtune.inference.placement.load_model", load)
    run = with_held_out_rows(tmp_path, base=tiny.save_base(tmp_path / "base", vocab_size=320))
    loaded.clear()
    evaluate(run)
    assert loaded[0].get_input_embeddings().num_embeddings == loaded[0].config.vocab_size == 320
    again = runs.load_tuned(run)(torch.tensor([[1, 40, 41]])).logits
    assert again.shape[-1] == 320


@pytest.mark.parametrize(
    ("change", "file"),
    [("changed", "adapter_model.safetensors"), ("added", "trained.safetensors"), ("removed", "base.json")],
)
def test_refuses_delta_changed_since_training(tmp_path: Path, change: str, file: str) -> None:
    run = with_held_out_rows(tmp_path)
    path = run.delta / file
    if change == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change == "added":
        path.write_bytes(b"")
    else:
        path.unlink()
    remedy = "remove it" if change == "added" else f"run it again: llmtune train {run.path}"
    message = f"{path}: was {change} after `llmtune train`; {remedy}"
    with pytest.raises(ProofError, match=re.escape(message)):
        evaluate(run)
    assert not run.done("eval")


@pytest.mark.parametrize("part", ["train", "test"])
def test_refuses_other_rows_than_the_run_was_made_with(tmp_path: Path, part: str) -> None:
    run = with_held_out_rows(tmp_path)
    source = getattr(run.recipe().data, part)
    rows = Path(source).read_text()
    Path(source).write_text(rows[: rows.rstrip().rindex("\n")])
    with pytest.raises(RecipeError, match=r"/run: the data changed since this run was made"):
        evaluate(run)
    assert not run.done("eval")


def test_refuses_run_without_delta(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path)
    for file in run.delta.iterdir():
        file.unlink()
    with pytest.raises(ProofError, match=r"delta: is missing or not finished; first: llmtune train"):
        evaluate(run)


def test_stores_everything_that_decides_a_score(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path)
    evaluate(run)
    settings = read_json(run.eval / "settings.json")
    held = settings["held_out"]
    trained = {json.loads(line)["id"] for line in (tmp_path / "train.jsonl").read_text().splitlines()}
    assert held["chat_template"] is True
    assert settings["chat_template_sha256"] == hashlib.sha256(tiny.CHATML.encode()).hexdigest()
    assert settings["chat_template_sha256"] == read_json(run.data_file)["template_sha256"]
    assert held["shots"] == len(held["shots_ids"]) == 2
    assert set(held["shots_ids"]) <= trained
    assert held["decoding"] == {"greedy": True, "new_tokens": 6, "stop_ids": [2]}
    assert settings["limit"] is None
    assert settings["bos"] == {"token": None, "by": "chat template"}
    assert settings["versions"]["lm_eval"] == importlib.metadata.version("lm_eval")
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    assert settings["base"]["weights"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    recorded = run.manifest()["steps"]["train"]["files"]["delta/adapter_model.safetensors"]["sha256"]
    assert settings["delta"]["adapter_model.safetensors"] == recorded
    base, tuned = (read_json(run.eval / f"{name}.json") for name in ("base", "tuned"))
    assert base["settings"] == tuned["settings"]
    assert tuned["delta"] == settings["delta"]
    assert base["delta"] is None
    assert run.done("eval")


def test_repeats_the_same_results(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path)
    assert evaluate(run) == evaluate(run)


def test_stores_question_prompt_and_answers_of_each_row(tmp_path: Path) -> None:
    stored = evaluate(with_held_out_rows(tmp_path))
    row = stored["tuned"]["rows"][0]
    assert row["id"] == "sum-0"
    assert (row["question"], row["answer"]) == ("0 plus 0?", "0")
    assert row["prompt"] == "<|im_start|>user\n0 plus 0?<|im_end|>\n<|im_start|>assistant\n"
    assert set(row) == {"id", "question", "prompt", "answer", "output", "exact_match", "loss"}
    few = stored["base"]["few_shot_rows"][0]["prompt"]
    assert few.count("<|im_start|>user") == 3
    assert few.endswith(row["prompt"])


@pytest.mark.parametrize(
    ("path", "value"),
    [(("held_out", "shots"), 5), (("limit",), 3), (("chat_template_sha256",), "0"), (("dtype",), "x")],
)
def test_refuses_to_compare_different_settings(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    stored = evaluate(with_held_out_rows(tmp_path))
    other = copy.deepcopy(stored["base"])
    section = other["settings"]
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(ProofError, match=f"different settings cannot be compared: {'.'.join(path)} is "):
        compare(stored["tuned"], other)
    assert compare(stored["tuned"], stored["base"])["held_out"]["loss"]["n"] == 5


def test_shows_limit_with_every_score(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path, eval={**runs.QUICK, "limit": 2})
    stored = evaluate(run)
    assert [row["n"] for row in table(run)] == ["2 of 5"] * 3
    result = stored["tuned"]["results"]["held_out"]
    assert (result["n"], result["of"], result["limit"], result["metrics"]["loss"]["n"]) == (2, 5, 2, 2)
    assert " ± " in table(run)[0]["loss"]


def test_counts_and_reports_truncated_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "no room", "prompt": "w" * 491, "completion": "1"}, *tiny.sums(20)]
    stored = evaluate(with_held_out_rows(tmp_path, rows, eval={"suite": "quick", "shots": 0}))
    result = stored["base"]["results"]["held_out"]
    assert (result["truncated"], result["n"], result["metrics"]["loss"]["n"]) == (1, 5, 5)
    assert "warning: base, zero-shot: 1 requests were longer than the model's context" in capsys.readouterr().out


def test_rows_longer_than_the_context_are_not_asked_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "long", "prompt": "words " * 100, "completion": "1"}, *tiny.sums(20)]
    stored = evaluate(with_held_out_rows(tmp_path, rows, eval={"suite": "quick", "shots": 5}))
    for name in ("base", "tuned"):
        result = stored[name]["results"]["held_out"]
        assert (result["truncated"], result["n"], result["of"], result["metrics"]["loss"]["n"]) == (0, 4, 5, 4)
        assert stored[name]["settings"]["held_out"]["not_asked"] == ["long"]
    assert stored["base"]["results"]["held_out_few_shot"]["n"] == 4
    words = "warning: 1 of 5 held-out rows are longer than the model's context of 512 tokens and are not asked (long)"
    assert words in capsys.readouterr().out


def test_uses_the_worked_examples_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"r{n}", "prompt": f"{n} " + "w" * 100, "completion": str(n)} for n in range(20)]
    stored = evaluate(with_held_out_rows(tmp_path, rows, eval={"suite": "quick", "shots": 5}))
    assert stored["base"]["results"]["held_out_few_shot"]["shots"] == 3
    settings = stored["settings"]["held_out"]
    assert (settings["shots"], settings["shots_wanted"], len(settings["shots_ids"])) == (3, 5, 3)
    assert "few-shot: 3 worked examples, not 5: more do not fit" in capsys.readouterr().out


def test_reports_valid_json_for_json_answers(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "prompt": f"say {n}", "completion": f'{{"n":{n}}}'} for n in range(20)]
    run = with_held_out_rows(tmp_path, rows, eval={"suite": "quick", "shots": 0})
    evaluate(run)
    assert list(table(run)[0]) == ["model", "valid JSON", "field F1", "exact match", "loss", "n"]
    assert [row["model"] for row in table(run)] == ["base, zero-shot", "tuned"]


def test_skips_worked_examples_without_chat_template(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    stored = evaluate(with_held_out_rows(tmp_path, base=base))
    assert list(stored["base"]["results"]) == ["held_out"]
    assert stored["base"]["rows"][0]["prompt"] == "0 plus 0?"
    assert stored["settings"]["held_out"]["chat_template"] is False


def test_shows_suite_tasks_beside_held_out_rows(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    mine(folder)
    (folder / "suite.yaml").write_text("tasks: [held_out, task.yaml]\nlimit: 3\n")
    run = with_held_out_rows(tmp_path, eval={"suite": str(folder / "suite.yaml"), "shots": 1})
    stored = evaluate(run)
    assert [row["mine"].endswith("(n 3 of 4)") for row in table(run) if row["mine"] != "-"] == [True, True]
    assert [row["mine"] for row in table(run)][1] == "-"
    assert stored["tuned"]["differences"]["base, zero-shot"]["mine"]["acc"]["n"] == 3
    assert stored["settings"]["tasks"]["names"] == {"mine": {"version": "Yaml"}}
    assert stored["base"]["results"]["held_out"]["n"] == 5
    assert read_json(run.eval / "settings.json")["configs"]["mine"]["doc_to_choice"] == ["no", "yes"]


def test_shows_suite_without_held_out_rows(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    mine(folder)
    (folder / "suite.yaml").write_text("tasks: [task.yaml]\n")
    run = with_held_out_rows(tmp_path, eval={"suite": str(folder / "suite.yaml")})
    evaluate(run)
    assert [list(row) for row in table(run)] == [["model", "mine"]] * 2


def test_refuses_recipe_without_held_out_rows(tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(10))
    run = with_held_out_rows(tmp_path, data={"train": str(rows), "eval_fraction": 0.2})
    run.recipe_file.write_text(run.recipe_file.read_text().replace("eval_fraction: 0.2", "eval_fraction: 0.0"))
    with pytest.raises(RecipeError, match=r"data: has no held-out rows; set data.test, data.eval or"):
        evaluate(run)
