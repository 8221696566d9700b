"""Scoring tasks through lm-eval: what is asked, what is truncated, and that the model stays as it was."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from llmtune.data.encoding.encode import prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.rows import read
from llmtune.evaluation.generate import hides_left_padding, shares_start
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.held_out.task import HeldOut
from llmtune.evaluation.questions import questions
from llmtune.evaluation.tasks import load_tasks
from llmtune.inference.room import Room, row_bytes
from tests.support import architectures, tiny
from tests.support.rooms import recorded, set_room
from tests.support.suites import load

STOP = {2}
RULES = Rules(512, "drop", "last_answer")


def held_out(folder: Path, rows: list[dict[str, Any]], shots: int = 0, tokenizer: Any = None) -> HeldOut:
    """Make a task of rows, with the first few of them as worked examples."""
    loaded = read(str(tiny.write_rows(folder / "rows.jsonl", rows)))
    encoded = questions(loaded[shots:], loaded[:shots], None, tokenizer or tiny.tokenizer(), STOP, RULES)
    return HeldOut("held_out", encoded, STOP, 6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_answers_equal_model_generate(tmp_path: Path, kind: str) -> None:
    model, tokenizer = tiny.model(kind, hidden=64).eval(), tiny.tokenizer()
    task = held_out(tmp_path, tiny.sums(5))
    outputs = score_tasks(model, tokenizer, [task])["held_out"]["outputs"]
    for start, output in zip(task.questions.prompt_ids, outputs, strict=True):
        ids = model.generate(torch.tensor([start]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert output == tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True)
    assert shares_start(model) == (kind == "llama"), "both ways of generating are meant to be tested"


@pytest.mark.parametrize("kind", ["rwkv", "qwen3_5_text", "granitemoehybrid"])
def test_answers_of_models_that_carry_a_state_equal_those_of_single_rows(tmp_path: Path, kind: str) -> None:
    model, tokenizer = architectures.wide_model(kind), tiny.tokenizer()
    assert hides_left_padding(model) == (kind != "rwkv")
    task = held_out(tmp_path, [{"id": str(n), "prompt": "a" * n, "completion": "b"} for n in (1, 9, 4)])
    outputs = score_tasks(model, tokenizer, [task])["held_out"]["outputs"]
    for start, output in zip(task.questions.prompt_ids, outputs, strict=True):
        ids = model.generate(torch.tensor([start]), max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert output == tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answer_ends_before_stop_token(tmp_path: Path, kind: str) -> None:
    model, tokenizer = tiny.model(kind).eval(), tiny.tokenizer()
    task = held_out(tmp_path, tiny.sums(3))
    free = score_tasks(model, tokenizer, [task])["held_out"]["outputs"]
    first = tokenizer(free[0], add_special_tokens=False)["input_ids"][0]
    task.generation["stop_ids"] = [first]
    assert score_tasks(model, tokenizer, [task])["held_out"]["outputs"][0] == ""


def test_puts_worked_examples_after_system_message(tmp_path: Path) -> None:
    turns = [("system", "Add."), ("user", "1 1"), ("assistant", "2"), ("user", "2 2"), ("assistant", "4")]
    rows = [
        {"id": str(n), "messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in (1, 2)
    ]
    (prompt,) = held_out(tmp_path, rows, shots=1).questions.prompts
    turns_in_order = ["system\nAdd. 2", "user\n1 1 1", "assistant\n2 1", "user\n2 2 1", "assistant\n4 1"]
    turns_in_order += ["user\n1 1 2", "assistant\n2 2", "user\n2 2 2"]
    assert prompt == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns_in_order) + "<|im_start|>assistant\n"


def test_loss_counts_only_last_answer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    task = held_out(tmp_path, tiny.sums(4), shots=2)
    assert len(task.questions.examples) == 2
    for example, row in zip(task.questions.examples, task.questions.rows, strict=True):
        learned = [token for token in example.labels if token != -100]
        assert tokenizer.decode(learned) == row.answer + "<|im_end|>"


def test_prompt_ids_equal_training_with_one_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer("{{ bos_token }}" + tiny.CHATML)
    tokenizer.bos_token = "<|pad|>"
    task = held_out(tmp_path, tiny.sums(3), tokenizer=tokenizer)
    seen: list[list[int]] = []

    def answer(model: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        seen.extend(prompts)
        return [[5]] * len(prompts)

    monkeypatch.setattr("llmtune.evaluation.loaded_model.greedy", answer)
    score_tasks(tiny.model(), tokenizer, [task])
    assert sorted(seen) == sorted(prompt_ids(row.prompt, tokenizer) for row in task.questions.rows)
    assert all(ids.count(0) == 1 and ids[0] == 0 for ids in seen)


def test_counts_held_out_prompts_truncated_on_the_left(tmp_path: Path) -> None:
    rows = [*tiny.sums(2), {"prompt": "long " * 98, "completion": "1"}]
    task = held_out(tmp_path, rows)
    result = score_tasks(tiny.model(), tiny.tokenizer(), [task])["held_out"]
    assert (result["truncated"], result["n"], len(task.questions.examples)) == (1, 3, 3)


def test_counts_truncated_requests_of_tasks(tmp_path: Path) -> None:
    from tests.support.suites import mine

    text = mine(tmp_path, doc_to_text="{% if a %}{{ 'long ' * 200 }}{% else %}{{ q }}{% endif %}")
    (task,) = load_tasks(load(tmp_path, text))
    result = score_tasks(tiny.model(), tiny.tokenizer(), [task])["mine"]
    assert result["truncated"] == 4, "two rows with two choices each"


def test_keeps_vocabulary_padded_beyond_tokenizer(tmp_path: Path) -> None:
    model, ids = tiny.model(vocab_size=320).eval(), torch.tensor([[1, 40, 41]])
    before = model(ids).logits
    score_tasks(model, tiny.tokenizer(), [held_out(tmp_path, tiny.sums(3))])
    assert model.get_input_embeddings().num_embeddings == 320
    assert torch.equal(model(ids).logits, before)


def test_keeps_random_states_modes_and_weights(tmp_path: Path) -> None:
    model = tiny.model().train()
    model.model.layers[0].eval()
    task = held_out(tmp_path, tiny.sums(3))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        numpy.random.seed(1)
        torch.manual_seed(1)

    class Drawing(HeldOut):
        """A task that draws, as tasks with samplers of their own do."""

        def process_results(self, doc: dict[str, str], results: list[str]) -> dict[str, float]:
            draw()
            return super().process_results(doc, results)

    task.__class__ = Drawing
    seed()
    undisturbed = draw()
    seed()
    score_tasks(model, tiny.tokenizer(), [task])
    assert draw() == undisturbed
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].mlp.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_evaluation_does_not_change_later_training(tmp_path: Path) -> None:
    task = held_out(tmp_path, tiny.sums(3))

    def trained(evaluates: bool) -> dict[str, torch.Tensor]:
        model = tiny.model(attention_dropout=0.3).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        for _ in range(3):
            ids = torch.randint(3, 200, (2, 12))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                score_tasks(model, tiny.tokenizer(), [task])
        return dict(model.state_dict())

    plain, evaluated = trained(False), trained(True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in evaluated.items())


def test_sample_task_file_asks_the_same_as_held_out_rows(tmp_path: Path) -> None:
    import llmtune

    rows = read(str(Path(llmtune.__file__).parent / "sample" / "test.jsonl"))[:2]
    tokenizer, model = tiny.tokenizer(), tiny.model()
    (task,) = load_tasks(load(tmp_path, "tasks: [orders]\nchat_template: true"))
    score_tasks(model, tokenizer, [task], limit=2, template={})
    expected = questions(rows, [], None, tokenizer, STOP, RULES)
    assert [instance.args[0] for instance in task.instances] == expected.prompts
    assert [task.doc_to_target(instance.doc) for instance in task.instances] == [row.answer for row in rows]


def test_tasks_get_the_values_of_the_template(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("{{ mode }};" + tiny.CHATML)
    (task,) = load_tasks(load(tmp_path, "tasks: [orders]\nchat_template: true"))
    score_tasks(tiny.model(), tokenizer, [task], limit=1, template={"mode": "brief"})
    assert task.instances[0].args[0].startswith("brief;<|im_start|>")


def test_scores_json_answers_as_json(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": f'{{"n":{n}}}'} for n in (1, 2)]
    task = held_out(tmp_path, rows)
    doc = task.test_docs()[0]
    assert task.process_results(doc, ['{"n": 1}']) == {"exact_match": 1.0}
    assert task.process_results(doc, ["{'n': 1}"]) == {"exact_match": 0.0}
    plain = held_out(tmp_path, [*rows, {"prompt": "say", "completion": "hello"}])
    assert plain.process_results(doc, ['{"n": 1}']) == {"exact_match": 0.0}


def test_batches_of_tasks_fit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.suites import mine

    model = tiny.model()
    shapes = recorded(model)

    def score() -> Any:
        shapes.clear()
        return score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path))))["mine"]

    whole = score()
    assert max(rows for rows, _ in shapes) > 2
    longest = len("is 0 odd? yes")
    set_room(monkeypatch, Room(4 * row_bytes(model, longest), 128, 2048))
    assert score()["metrics"] == whole["metrics"]
    assert max(rows for rows, _ in shapes) == 2
