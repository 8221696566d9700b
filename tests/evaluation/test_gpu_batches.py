"""On a GPU, batches are as large as what is free there allows, and what they score stays the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.evaluation.generate import answer_losses, rows_per_batch
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.tasks import load_tasks
from llmtune.inference import room
from llmtune.inference.room import Room, room_for_batches, row_bytes
from llmtune.machine import device
from tests.evaluation.test_generate import example
from tests.support import tiny
from tests.support.rooms import recorded, set_room
from tests.support.suites import load, mine

ANSWERS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{q}}",
    "generation_kwargs": {"until": ["?"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, tokens: int = 16384) -> None:
    """Let batches be chosen as on a GPU with that much for them, on CPU tensors."""
    set_room(monkeypatch, Room(free, 512, tokens, is_gpu=True))


def test_losses_in_batches_of_free_memory_equal_those_of_fixed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(initializer_range=0.3).eval()
    start = [1, *range(40, 60)]
    examples = [example([*start, 100 + n, *range(60, 60 + n % 9 + 3), 2], 2) for n in range(40)]
    plain, shapes = answer_losses(model, examples, 0), recorded(model)
    shared, longest = 21, 13
    for rows in (4, 64):
        shapes.clear()
        gpu(monkeypatch, rows * row_bytes(model, longest, shared, longest))
        assert answer_losses(model, examples, 0) == pytest.approx(plain, rel=1e-5)
        assert max(batch for batch, tokens in shapes[1:] if tokens == longest) == min(rows, len(examples))
    gpu(monkeypatch, 2**40, tokens=60)
    shapes.clear()
    assert answer_losses(model, examples, 0) == pytest.approx(plain, rel=1e-5)
    assert max(batch * tokens for batch, tokens in shapes[1:]) <= 60


@pytest.mark.parametrize("keys", [{}, ANSWERS], ids=["likelihoods", "answers"])
def test_tasks_in_batches_of_free_memory_score_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    model = tiny.model(initializer_range=0.3)
    plain, shapes = (
        score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path, **keys)))),
        recorded(model),
    )
    seen = []
    for free in (2 * row_bytes(model, 15, scored=1 if keys else 15), 2**30):
        shapes.clear()
        gpu(monkeypatch, free)
        again = score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path, **keys))))
        assert again["mine"]["scores"] == plain["mine"]["scores"]
        seen.append(max(rows for rows, _ in shapes))
    assert seen[0] < seen[1]


def test_batch_size_follows_what_is_free_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(blocks=2, hidden=32)
    a_row = row_bytes(model, 100)
    assert a_row > 100 * 2 * 2 * 2 * 8 * 4  # keys and values
    rooms = (Room(rows * a_row, 512, 16384) for rows in (0, 1, 7, 8, 100, 10**6))
    assert [room.fitting(a_row) for room in rooms] == [1, 1, 4, 8, 64, 512]
    gpu(monkeypatch, 8 * a_row)
    assert rows_per_batch(model, 20, 100) == 7
    assert row_bytes(model, 100, shared=50) > a_row
    assert row_bytes(model, 100, scored=2) == a_row + 259 * 12


def test_half_of_a_gpu_is_for_batches_with_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("memory_reserved", 50), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80, 200))
    assert device.free_bytes(torch.device("cuda", 0)) == 100
    monkeypatch.setattr(room, "free_bytes", lambda device: 100)

    class OnGpu:
        device = torch.device("cuda", 0)

    on_gpu: Any = OnGpu()
    assert room_for_batches(on_gpu) == Room(50, 512, 16384, is_gpu=True)
