"""Room for batches as a test wants it, and the batches that a model was given."""

from typing import Any

import pytest
import torch

from llmtune.evaluation import generate, loaded_model
from llmtune.inference import ends
from llmtune.inference.room import Room


def set_room(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    """Let batches be chosen for this room, whatever is free."""
    for module in (ends, generate, loaded_model):
        monkeypatch.setattr(module, "room_for_batches", lambda model: room)


def recorded(model: Any) -> list[torch.Size]:
    """The shapes of the token ids that a model is given."""
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, arguments, options: shapes.append((arguments or (options["input_ids"],))[0].shape),
        with_kwargs=True,
    )
    return shapes
