"""Batched greedy answers and losses are those of one row at a time."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from llmtune.data.encoding.encode import Example
from llmtune.evaluation.generate import answer_losses, greedy, rows_per_batch, shares_start
from llmtune.inference import cache, live, room
from llmtune.inference.live import LiveRows
from llmtune.inference.passes import limit_head
from llmtune.inference.room import Room, in_halves, measured_once, row_bytes
from tests.support import architectures, tiny
from tests.support.rooms import set_room

PROMPTS = [[1, 40, 41, 42, 43, *range(60, 60 + 5 * n + 1)] for n in range(5)]
# Weights so small that attention is nearly even would hide wrong positions.
WIDE = 0.3
EVERY = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mistral"]


def example(ids: list[int], answer: int) -> Example:
    """An example whose last `answer` tokens are supervised."""
    return Example("a", "a:1", ids, [-100] * (len(ids) - answer) + ids[-answer:])


def alone(model: Any, prompt: list[int], stop: set[int], new_tokens: int) -> list[int]:
    """Greedy tokens without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_batched_answers_equal_single_rows(kind: str) -> None:
    model = tiny.model(kind, hidden=64, initializer_range=WIDE).eval()
    assert shares_start(model)
    first = [alone(model, prompt, set(), 12) for prompt in PROMPTS]
    stop = {first[0][3], first[2][1]}
    assert greedy(model, PROMPTS, stop, 12) == [alone(model, prompt, stop, 12) for prompt in PROMPTS]
    assert greedy(model, PROMPTS[:1], stop, 12) == [alone(model, PROMPTS[0], stop, 12)]
    apart = [[50, *PROMPTS[0]], PROMPTS[3]]
    assert greedy(model, apart, stop, 12) == [alone(model, prompt, stop, 12) for prompt in apart]


@torch.no_grad()
def test_ended_rows_leave_the_batch_without_changing_others() -> None:
    model = tiny.model(hidden=64, initializer_range=WIDE).eval()
    prompts = [[1, 40, *range(50, 50 + n)] for n in range(1, 17)]
    free = [alone(model, prompt, set(), 10) for prompt in prompts]
    stop = {answer[place % 5] for place, answer in enumerate(free[:8])}
    answers = greedy(model, prompts, stop, 10)
    assert answers == [alone(model, prompt, stop, 10) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 1, "all rows ended together: nothing was tested"


@pytest.mark.parametrize("kind", ["gpt2", "rwkv"])
def test_answers_of_models_that_share_no_start_equal_single_rows(kind: str) -> None:
    """RWKV reads padding on the left as text."""
    model = architectures.wide_model(kind)
    assert not shares_start(model)
    prompts = [[40], list(range(40, 57)), [50, 60, 70], list(range(80, 97))]

    def alone(prompt: list[int], stop: set[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        options |= {"attention_mask": torch.ones_like(ids), "eos_token_id": sorted(stop)}
        output: torch.Tensor = model.generate(ids, **options)
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer

    def second(logits: torch.Tensor, places: Any) -> torch.Tensor:
        return logits.topk(2).indices[:, 1]

    free = [alone(prompt, {2}) for prompt in prompts]
    stop, counted = {free[0][len(free[0]) // 2]}, list[float]()
    assert greedy(model, prompts, stop, 6, counted.append) == [alone(prompt, stop) for prompt in prompts]
    assert sum(counted) == len(prompts)
    seconds = greedy(model, prompts, stop, 6, choose=second)
    assert seconds == [greedy(model, [prompt], stop, 6, choose=second)[0] for prompt in prompts]
    assert all(one[0] != likeliest[0] for one, likeliest in zip(seconds, free, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_refuses_shared_start_without_rotary_full_attention(kind: str) -> None:
    assert not shares_start(tiny.model(kind))


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_batched_losses_equal_single_rows(kind: str) -> None:
    model = tiny.model(kind).eval()
    examples = [
        example([*prompt, 9, 8, 7, 2][: len(prompt) + 4], 3 + place % 2) for place, prompt in enumerate(PROMPTS)
    ]
    expected = []
    for one in examples:
        loss = model(torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss
        expected.append(float(loss) * one.supervised)
    assert answer_losses(model, examples, pad_id=0) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_loss_counts_first_answer_token_with_equal_prompts() -> None:
    model = tiny.model(initializer_range=WIDE).eval()
    examples = [example([*PROMPTS[2], 70 + place, 2], 2) for place in range(3)]
    expected = [2 * float(model(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss) for e in examples]
    assert answer_losses(model, examples, pad_id=0) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_losses_keep_row_order_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model().eval()
    examples = [example([1, 40, *range(60, 60 + n), 2], 2) for n in (30, 2, 17, 5, 23)]
    whole = answer_losses(model, examples, pad_id=0)
    set_room(monkeypatch, Room(2**40, 128, 20))
    assert answer_losses(model, examples, pad_id=0) == pytest.approx(whole, rel=1e-5)
    assert len(set(whole)) == 5


@torch.no_grad()
def test_computes_only_logits_that_are_read() -> None:
    model = tiny.model().eval()
    sizes = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, made: sizes.append(tuple(made.shape[:-1]))
    )
    answer_losses(model, [example([1, 40, *range(60, 90), 2], 2), example([1, 40, 70, 2], 2)], pad_id=0)
    greedy(model, PROMPTS, {999}, 3)
    positions = [torch.Size(size).numel() for size in sizes]
    assert max(positions) <= len(PROMPTS)
    with limit_head(model, lambda hidden: hidden[:, :1]):
        pass
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


def test_batches_follow_what_is_free_and_stay_the_same_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too; within one evaluation, memory that others take or give back changes no batch."""
    model = tiny.model(blocks=2, hidden=32)
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * 40 * row_bytes(model, 100))
    assert rows_per_batch(model, 120, 100) == 30  # four batches of at most 32
    assert rows_per_batch(model, 10, 2**30) == 1
    with measured_once(model):
        monkeypatch.setattr(room, "free_bytes", lambda device: 2**60)
        assert rows_per_batch(model, 120, 100) == 30
    assert rows_per_batch(model, 120, 100) == 120
    assert rows_per_batch(model, 300, 100) == 100


def test_a_batch_that_does_not_fit_after_all_is_halved() -> None:
    tried: list[int] = []

    def work(rows: Any) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * row for row in rows]

    assert in_halves(work, range(7), tiny.model()) == [0, 10, 20, 30, 40, 50, 60]
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    with pytest.raises(MemoryError):
        in_halves(lambda rows: (_ for _ in ()).throw(MemoryError()), range(3), tiny.model())


@torch.no_grad()
def test_a_cache_with_room_gives_the_same_bits_as_a_copied_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through growth beyond its room, and rows that leave."""
    monkeypatch.setattr(cache, "STEPS", 3)
    model = tiny.model(hidden=64, initializer_range=WIDE).eval().to(torch.bfloat16)
    roomy = LiveRows(model, PROMPTS)
    monkeypatch.setattr(live, "GrowingLayer", DynamicLayer)
    plain = LiveRows(model, PROMPTS)
    for place in range(9):
        assert torch.equal(plain.logits, roomy.logits)
        tokens = roomy.logits.argmax(-1)
        for rows in (roomy, plain):
            if place == 4:
                rows.keep([0, 2, 3])
            rows.grow(tokens[[0, 2, 3]] if place == 4 else tokens)
    assert roomy._cache.layers[0].keys.untyped_storage().nbytes() > roomy._cache.layers[0].keys.nbytes


def test_losses_of_bf16_model_are_those_of_fp32() -> None:
    model = tiny.model(initializer_range=WIDE).eval().to(torch.bfloat16)
    rows = [example(prompt, 4) for prompt in PROMPTS]
    for row, loss in zip(rows, (answer_losses(model, [row], 0)[0] for row in rows), strict=True):
        with torch.no_grad():
            logs = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        expected = -sum(logs[place - 1, row.input_ids[place]].item() for place in range(-4, 0))
        assert loss == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("stop", [set(), {40, 60}])
def test_greedy_counts_every_prompt_once(stop: set[int]) -> None:
    counted: list[float] = []
    greedy(tiny.model(initializer_range=WIDE).eval(), PROMPTS, stop, 7, counted.append)
    assert sum(counted) == pytest.approx(len(PROMPTS))
    assert len(counted) > 1
    assert min(counted) >= 0
