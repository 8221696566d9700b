"""The room for batches, and the largest batch that a model was given."""

from typing import Any

import pytest
import torch

from llmtune.evaluation.generate import answer_losses
from llmtune.inference import room
from llmtune.inference.room import largest_batch, room_for_batches
from llmtune.machine import processes
from tests.evaluation.test_generate import example
from tests.support import tiny


def test_largest_batch_leaves_out_passes_that_memory_ended() -> None:
    model = tiny.model().eval()

    def fill(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if len(given[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.model.layers[0].register_forward_pre_hook(fill)
    rows = [example([60 + n, *range(40, 50), 2], 2) for n in range(7)]
    with largest_batch(model) as batch:
        answer_losses(model, rows, 0)
    assert batch.rows == 3, "seven rows are read as three and twice two"
    hook.remove()
    answer_losses(model, rows, 0)
    assert batch.rows == 3, "what follows the block is not counted"


def test_processes_of_a_machine_share_its_memory_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(room, "free_bytes", lambda device: 1200)
    assert room_for_batches(model).free == 600
    monkeypatch.setattr(processes, "here", lambda: 3)
    assert room_for_batches(model).free == 200
