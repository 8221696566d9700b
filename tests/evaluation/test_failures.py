"""What cannot be scored is said in one line with its exit code; what can be, is stored without NaN."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune import working
from llmtune.errors import LlmtuneError, MachineError, ProofError, RecipeError
from llmtune.evaluation import asking, loaded_model, step, tasks
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.step import evaluate
from llmtune.evaluation.tables import difference_table, table
from llmtune.evaluation.tasks import load_tasks
from llmtune.files import cache_folder, write_json
from llmtune.launch.guard import guarded_step
from llmtune.model.files.fingerprints import describe_base
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.working import Work
from tests.support import tiny
from tests.support.runs import with_held_out_rows
from tests.support.suites import load, mine


def spoiled(file: Path, name: str, value: float = float("nan"), row: int | None = None) -> None:
    """Write a value that is not finite into a tensor of a safetensors file, or into one row of it."""
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key][slice(None) if row is None else row] = value
    save_file(tensors, file, {"format": "pt"})


def strictly(file: Path) -> Any:
    """Read JSON that holds no NaN and no infinity, which are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {file}")

    return json.loads(file.read_text(), parse_constant=refuse)


def made_with_this_base(run: Run) -> Run:
    """Let a run take its base as it is now for the one that it was made with."""
    base = locate_base(run.recipe().model)
    write_json(run.manifest_file, {**run.manifest(), "base": describe_base(base)})
    return run


def with_rows_not_finite(folder: Path) -> Run:
    """Make a run whose base gives NaN for every text with a 3 in it: one of five held-out rows."""
    base = tiny.save_base(folder / "base", tied=False)
    token = tiny.tokenizer().convert_tokens_to_ids("3")
    run = with_held_out_rows(folder, base=base, eval={"suite": "quick", "shots": 0})
    spoiled(base / "model.safetensors", "embed_tokens", row=token)
    return made_with_this_base(run)


def test_rows_that_are_not_finite_are_stored_as_null_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_rows_not_finite(tmp_path)
    evaluate(run)
    result = strictly(run.eval / "tuned.json")["results"]["held_out"]
    assert strictly(run.eval / "base.json")["rows"][3]["loss"] is None
    assert result["metrics"]["loss"] == {"value": None, "stderr": None, "n": 5}
    assert [score is None for score in result["scores"]["loss"]] == [False, False, False, True, False]
    assert [row["loss"] for row in table(run)] == ["not finite"] * 2
    gap = next(row for row in difference_table(run) if row["metric"].startswith("loss"))
    assert (gap["difference"], gap["verdict"]) == ("not finite", "not finite")
    assert "warning: tuned, zero-shot: 1 requests have a likelihood that is not a finite" in capsys.readouterr().out


def test_refuses_delta_that_is_not_finite_before_any_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_held_out_rows(tmp_path)
    spoiled(run.delta / "adapter_model.safetensors", "lora_B")
    run.mark("train", [run.delta])
    with pytest.raises(ProofError, match=r"adapter_model.safetensors: .*lora_B.* holds values that are not finite"):
        evaluate(run)
    assert "rows in" not in capsys.readouterr().out
    assert not run.eval.exists()


def test_refuses_base_whose_logits_are_not_finite(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path)
    spoiled(tmp_path / "base" / "model.safetensors", "layers.1.mlp.down_proj")
    made_with_this_base(run)
    with pytest.raises(ProofError, match="the base model's logits are not finite in float32, so it has no answers"):
        evaluate(run)


def test_refuses_task_on_which_no_likelihood_is_finite(tmp_path: Path) -> None:
    model = tiny.model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ProofError, match="base, mine: no log-likelihood is a finite number"):
        score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path))), name="base")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {
                "output_type": "loglikelihood",
                "doc_to_choice": None,
                "doc_to_target": "{{ 'long ' * 90 }}",
                "metric_list": [{"metric": "perplexity"}],
            },
            "OverflowError: math range error",
        ),
        (
            {
                "output_type": "generate_until",
                "doc_to_choice": None,
                "doc_to_target": "{{q}}",
                "generation_kwargs": {"max_gen_toks": 600},
                "metric_list": [{"metric": "exact_match"}],
            },
            "requested max tokens to generate (600) must be less than model's maximum sequence length (512)",
        ),
    ],
    ids=["overflow", "length"],
)
def test_names_task_that_lm_eval_cannot_score(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    model = tiny.model(initializer_range=0.3)
    with pytest.raises(ProofError) as raised:
        score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path, **keys))), name="tuned")
    assert str(raised.value).startswith("tuned, mine: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("greedy", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        (
            "answer_losses",
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        ),
        ("load_placed", MemoryError()),
    ],
)
def test_full_memory_says_what_lowers_it_and_that_the_training_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    place = {"greedy": loaded_model, "answer_losses": asking, "load_placed": step}[part]
    monkeypatch.setattr(place, part, fail)
    run = with_held_out_rows(tmp_path)
    words = (
        r"out of memory.*; lower eval\.shots, .* eval\.suite: none; training is safe in .*delta; continue with: llmtune"
    )
    with pytest.raises(MachineError, match=words) as raised, guarded_step(run, "eval"):
        evaluate(run)
    named = {"greedy": "base, zero-shot: ", "answer_losses": "base, zero-shot, loss: ", "load_placed": "evaluation: "}
    assert str(raised.value).startswith(f"{named[part]}out of memory")
    assert not run.eval.exists()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (AssertionError(), RecipeError, "lm-eval cannot load task.yaml: AssertionError"),
        (
            ModuleNotFoundError("No module named 'antlr4'", name="antlr4"),
            MachineError,
            "needs the Python package antlr4",
        ),
        (RuntimeError("a\nb"), RecipeError, "lm-eval cannot load task.yaml: RuntimeError: a"),
        (TimeoutError(), MachineError, "needs its rows from the Hub, which cannot be reached"),
    ],
)
def test_every_error_while_loading_a_task_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[LlmtuneError], message: str
) -> None:
    class Manager:
        """A task manager that fails to load anything."""

        all_tasks = ()

        def __init__(self, **_: Any) -> None: ...

        def load(self, specs: list[Any]) -> None:
            raise error

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    with pytest.raises(kind) as raised:
        load_tasks(load(tmp_path, mine(tmp_path)))
    assert message in str(raised.value)
    assert "suite.yaml:1: tasks.0: " in str(raised.value)


class Recorded(Work):
    """A piece of work that is kept, with all that was done of it."""

    every: ClassVar[list["Recorded"]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.every.append(self)


def test_shows_rows_done_of_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "Work", Recorded)
    monkeypatch.setattr(Recorded, "every", [])
    folder = tmp_path / "suite"
    mine(folder)
    (folder / "suite.yaml").write_text("tasks: [held_out, task.yaml]\n")
    run = with_held_out_rows(tmp_path, eval={"suite": str(folder / "suite.yaml"), "shots": 2})
    shutil.rmtree(cache_folder() / "fingerprints")
    evaluate(run)
    shown = {(work.name, work.total, work.unit): work.share for work in Recorded.every}
    for asked in ("base, zero-shot", "base, 2-shot", "tuned, zero-shot"):
        assert shown[asked, 5, "rows"] == pytest.approx(1)
        assert shown[f"{asked}: loss", 5, "rows"] == 1
    assert shown["base, mine", 8, "requests"] == shown["tuned, mine", 8, "requests"] == 1
    assert shown["loading tasks", 1, "tasks"] == 1
    assert [share for (name, total, _), share in shown.items() if "hashing" in name and total] == [1]
    assert {"loading the base model", "loading the tuned model"} <= {name for name, _, _ in shown}


def test_prints_lines_outside_a_terminal_and_no_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(working, "DELAY", 0.0)
    tasks_of_suite = load_tasks(load(tmp_path, mine(tmp_path)))
    capsys.readouterr()
    score_tasks(tiny.model(), tiny.tokenizer(), tasks_of_suite, name="base")
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert [line for line in lines if not re.match("base, mine(:|$)", line)] == []


def test_counts_every_request_of_a_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, float] = {}

    def count(name: str, total: float, unit: str) -> Any:
        def step(amount: float = 1) -> None:
            counted[unit] = counted.get(unit, 0) + amount / total

        return contextlib.nullcontext(step)

    monkeypatch.setattr(loaded_model, "working", count)
    rolling: dict[str, Any] = {
        "doc_to_text": "",
        "doc_to_choice": None,
        "doc_to_target": "{{q}}",
        "output_type": "loglikelihood_rolling",
    }
    answers: dict[str, Any] = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{q}}"}
    answers |= {"generation_kwargs": {"until": ["?"], "max_gen_toks": 4}}
    every: tuple[dict[str, Any], ...] = ({}, {**rolling, "metric_list": [{"metric": "word_perplexity"}]}, answers)
    for keys in every:
        metrics = {"metric_list": [{"metric": "exact_match"}]} if keys is answers else {}
        score_tasks(tiny.model(), tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path, **keys, **metrics))))
    assert counted == pytest.approx({"requests": 1, "windows": 1, "rows": 1})


def test_stores_the_settings_that_were_used(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path, eval={"suite": "quick", "shots": 1, "limit": 3})
    evaluate(run)
    settings = strictly(run.eval / "settings.json")["eval"]
    assert settings | {"suite": "quick", "shots": 1, "limit": 3, "rows": 64} == settings


def test_replaces_earlier_results_as_a_whole(tmp_path: Path) -> None:
    run = with_held_out_rows(tmp_path)
    run.eval.mkdir()
    (run.eval / "base.json").write_text("old")
    evaluate(run)
    assert sorted(file.name for file in run.eval.iterdir()) == ["base.json", "settings.json", "tuned.json"]
    assert run.done("eval")
