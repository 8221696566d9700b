"""The best checkpoint: which one becomes the delta, when patience ends a training, and what a resumed run counts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune import recipe as recipes
from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.generate import greedy, hides_left_padding
from llmtune.evaluation.held_out.truth import Truth
from llmtune.files import read_json
from llmtune.reporting.page import render
from llmtune.run import Run
from llmtune.training.checkpoint import TENSORS
from llmtune.training.loop import train
from llmtune.training.prepare import plan_alone
from llmtune.training.selection.answers import AnswerScore, answer_score
from llmtune.training.selection.best import BestCheckpoint
from tests.support import architectures, tiny
from tests.support.training import prepare_run

FULL = {"kind": "full", "lr": 0.01}
FROZEN = {"kind": "frozen", "reach": 2, "lr": 0.01}
TOP = {"kind": "frozen", "reach": 1, "lr": 0.01}
LOSS = ("train.keep_best", "try loss")
TRAIN = {"max_steps": 8, "batch_size": 4, "save_every": 0.25, "keep": 1}


class EndsAfter(TrainerCallback):
    """Ends the training as a kill would, after a step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the losses of validations at steps 2, 4, ..., as the best checkpoint sees them."""

    def put(*values: float) -> None:
        hears = BestCheckpoint.on_evaluate

        def on_evaluate(self: Any, args: Any, state: Any, control: Any, metrics: Any, **named: Any) -> None:
            hears(self, args, state, control, {"eval_loss": values[state.global_step // 2 - 1]}, **named)

        monkeypatch.setattr(BestCheckpoint, "on_evaluate", on_evaluate)

    return put


def steps_of(run: Run) -> list[int]:
    """The optimizer steps in a run's log."""
    return [entry["step"] for entry in map(json.loads, run.log_file.open()) if "loss" in entry]


def test_delta_is_the_best_checkpoint_and_says_so(tmp_path: Path, losses: Any) -> None:
    losses(3.0, 1.0, 2.0, float("nan"))
    run = prepare_run(tmp_path, FULL, train={**TRAIN, "keep_best": True})
    train(run)
    kept = sorted(folder.name for folder in run.checkpoints.iterdir())
    assert kept == ["step-000004", "step-000008"]
    delta, last = (load_file(file) for file in (run.delta / TENSORS, run.checkpoints / kept[1] / TENSORS))
    best = load_file(run.checkpoints / kept[0] / TENSORS)
    assert (run.delta / TENSORS).samefile(run.checkpoints / kept[0] / TENSORS)
    assert all(torch.equal(delta[name], best[name]) for name in best)
    assert any(not torch.equal(delta[name], last[name]) for name in last)
    words = "best: step 4, validation loss 1, is the result; step 8, the last one, has nan"
    assert read_json(run.manifest_file)["steps"]["train"]["best"]["in_words"] == words
    assert words in render(run)
    assert [entry["best"] for entry in map(json.loads, run.log_file.open()) if "best" in entry] == [words]


@pytest.mark.slow
def test_patience_ends_training_and_a_resumed_run_goes_on_counting(tmp_path: Path, losses: Any) -> None:
    losses(1.0, 2.0, 3.0, 0.5)
    settings = {**TRAIN, "keep_best": "loss", "patience": 2}
    whole = prepare_run(tmp_path / "whole", FULL, train=settings)
    train(whole)
    parts = prepare_run(tmp_path / "parts", FULL, train=settings)
    with pytest.raises(KeyboardInterrupt):
        train(parts, callbacks=[EndsAfter(4)])
    train(parts)
    assert steps_of(whole) == steps_of(parts) == [1, 2, 3, 4, 5, 6]
    for run in (whole, parts):
        entry = run.manifest()["steps"]["train"]
        assert (entry["steps"], entry["best"]["step"]) == (6, 2)
    first, second = (load_file(run.delta / TENSORS) for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("patience", "end"), [(None, 8), (2, 6)])
@pytest.mark.slow
def test_run_that_ended_before_its_delta_still_gives_the_best(
    tmp_path: Path, losses: Any, patience: int | None, end: int
) -> None:
    losses(1.0, 2.0, 3.0, 4.0)
    run = prepare_run(tmp_path, FULL, train={**TRAIN, "keep_best": True, "patience": patience})
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[EndsAfter(end)])
    train(run)
    delta, best = (load_file(file) for file in (run.delta / TENSORS, run.checkpoints / "step-000002" / TENSORS))
    assert all(torch.equal(delta[name], best[name]) for name in best)
    entry = run.manifest()["steps"]["train"]
    assert (entry["steps"], entry["best"]["step"], steps_of(run)[-1]) == (end, 2, end)
    assert entry["best"]["in_words"] == f"best: step 2, validation loss 1, is the result; step {end} ended the training"


def test_patience_waits_for_the_last_stage(tmp_path: Path, losses: Any) -> None:
    losses(1.0, 2.0, 3.0, 4.0)
    gradual = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01}
    run = prepare_run(tmp_path, gradual, train={**TRAIN, "keep_best": True, "patience": 1})
    train(run)
    starts = [stage["start"] for stage in read_json(run.plan_file)["stages"]]
    assert steps_of(run)[-1] == next(step for step in (2, 4, 6, 8) if step > starts[-1])


@pytest.mark.parametrize("adapter", ["none", {"kind": "lora", "rank": 4}], ids=["none", "lora"])
def test_score_is_of_the_answers_that_the_model_gives_alone(tmp_path: Path, adapter: Any) -> None:
    method = {**FROZEN, "adapter": adapter}
    train_settings = {"max_steps": 4, "batch_size": 4, "save_every": 0.5, "keep_best": "score"}
    run = prepare_run(tmp_path, method, train=train_settings, eval={"suite": "none", "rows": 5})
    seen: list[tuple[int, int]] = []
    right = AnswerScore.right

    def count(self: AnswerScore, model: Any) -> int:
        result = right(self, model)
        seen.append((result, self.count))
        for prompt, true in zip(self._prompts, self._true, strict=True):
            (alone,) = greedy(model, [prompt], self._stop, self._new_tokens)
            text = self._reader.text(alone)
            own = (Truth(text, text), true[1])
            self._true = [own if truth is true else truth for truth in self._true]
        assert right(self, model) == len(self._prompts)  # the answers that it gives are the true ones now
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(AnswerScore, "right", count)
    train(run)
    patch.undo()
    scores = [entry["eval_score"] for entry in map(json.loads, run.log_file.open()) if "eval_score" in entry]
    assert scores == [result / rows for result, rows in seen]
    assert len(scores) == 2


def test_score_takes_questions_that_follow_plain_texts() -> None:
    texts = [Example(f"t{n}", f"t:{n}", [5, 6], [5, 6], is_text=True) for n in range(3)]
    chats = [Example(f"c{n}", f"c:{n}", [5, 6, 2], [-100, 6, 2], 1) for n in range(3)]
    recipe: Any = SimpleNamespace(train=SimpleNamespace(keep_best="score"), eval=SimpleNamespace(rows=2))
    state: Any = SimpleNamespace(process_index=0, num_processes=1)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ""})
    rows = [*(Row(one.id, (), one.where, text="a") for one in texts), *(Row(one.id, turns, one.where) for one in chats)]
    score = answer_score(recipe, [*texts, *chats], rows, tiny.tokenizer(), {2}, state)
    assert score is not None
    assert score.count == 2


def test_score_is_of_the_answers_that_a_model_that_reads_padding_gives_alone() -> None:
    model, tokenizer = architectures.wide_model("rwkv"), tiny.tokenizer()
    assert not hides_left_padding(model)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "d"})
    answer = tokenizer("dddd", add_special_tokens=False)["input_ids"]
    examples, rows = list[Example](), list[Row]()
    for size in (1, 9, 4):
        ids, labels = [*range(40, 40 + size), *answer, 2], [*[-100] * size, *answer, 2]
        examples.append(Example(str(size), f"t:{size}", ids, labels, size))
        rows.append(Row(str(size), turns, f"t:{size}"))
    score = AnswerScore(examples, rows, tokenizer, {2}, (0, 1))
    alone = [score._answer(model, [prompt])[0] for prompt in score._prompts]
    assert score._answer(model, score._prompts) == alone
    assert len(set(map(tuple, alone))) == 3


def test_score_compares_answers_as_the_evaluation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"type": "function", "function": {"name": "warmth", "arguments": {"city": "Ulm", "days": [1, 2]}}}
    earlier, last = (
        {"role": "assistant", "content": "Warm."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    user = {"role": "user", "content": "a"}
    rows = [Row("r", (user, earlier, user, last), "t:1"), Row("s", (user, earlier), "t:2")]
    texts = ["Warm.", '{"name": "warmth", "arguments": {"city": "Ulm", "days": [1, 2]}}', "Warm."]
    tokenizer = tiny.tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    examples = [
        Example("r", where, [5, *answer, 2], [-100, *answer, 2], 1)
        for where, answer in zip(("t:1", "t:1", "t:2"), ids, strict=True)
    ]
    recipe: Any = SimpleNamespace(train=SimpleNamespace(keep_best="score"), eval=SimpleNamespace(rows=3))
    state: Any = SimpleNamespace(process_index=0, num_processes=1)
    score = answer_score(recipe, examples, rows, tokenizer, {2}, state)
    assert score is not None
    given = [" Warm. ", '{"arguments":{"days":[1,2],"city":"Ulm"},"name":"warmth"}', "Warm, warm."]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
    monkeypatch.setattr(score, "_answer", lambda *_: answers)
    assert score.right(tiny.model().eval()) == 2


@pytest.mark.parametrize(
    ("keep", "rows", "words"),
    [("score", [{"text": f"text {n}"} for n in range(9)], "plain texts; try loss"), (True, tiny.sums(1), "no valid")],
    ids=["texts", "one row"],
)
def test_refuses_rows_that_choose_nothing_before_training(tmp_path: Path, keep: Any, rows: Any, words: str) -> None:
    source = tiny.write_rows(tmp_path / "few.jsonl", rows)
    with pytest.raises(RecipeError, match=f"keep_best: .*{words}"):
        prepare_run(tmp_path, FULL, data={"train": str(source)}, train={**TRAIN, "keep_best": keep})


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"train": {"patience": 2}}, "train.patience", "set train.keep_best: true"),
        ({"train": {"keep_best": True}, "data": {"eval_fraction": 0}}, "train.keep_best", "needs validation rows"),
        ({"train": {"keep_best": "score"}, "memory": {"frozen_blocks": "stream"}, "method": TOP}, *LOSS),
        ({"train": {"keep_best": "score"}, "launch": {"accelerate": "fsdp2"}}, *LOSS),
    ],
    ids=["patience alone", "no rows", "stream", "fsdp2"],
)
def test_refuses_what_cannot_be_chosen(tmp_path: Path, sections: dict[str, Any], key: str, words: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    base = tiny.save_base(tmp_path / "base")
    data = {"train": str(rows), **sections.pop("data", {})}
    method = sections.pop("method", FULL)
    file = tiny.write_recipe(tmp_path / "r.yaml", base, rows, method, data=data, **sections)
    with pytest.raises(Exception, match=f"{key}: .*{words}") as error:
        plan_alone(recipes.load(file), 2)
    assert not isinstance(error.value, FieldError)  # it names the recipe's file and line
