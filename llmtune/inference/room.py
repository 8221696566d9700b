"""How many rows a batch without gradients may have, by what is free on the model's device."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from llmtune.errors import lacks_memory
from llmtune.machine import processes
from llmtune.machine.device import free_bytes, release_cached

_ACTIVATIONS = (8, 3)
"""Tensors that a block holds at once, at the most: as wide as the hidden state, and as the MLP."""
_MOST_ROWS = 512
_SHARE = 2
"""Batches take one part in so many of what is free; the rest is a margin for what is only estimated."""

Row = TypeVar("Row")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Room:
    """What a batch may take."""

    free: int
    """Bytes."""
    answers: int
    """Answers at the most that grow at one time: on a CPU, each of more of them takes as long."""
    tokens: int
    """Tokens at the most that go through the model at one time, padding included."""
    is_gpu: bool = False

    def fitting(self, bytes_per_row: int) -> int:
        """Return how many rows fit: a power of two, so that a little more or less memory changes nothing."""
        rows = max(1, min(_MOST_ROWS, self.free // bytes_per_row))
        return 1 << (rows.bit_length() - 1)


_MEASURED: list[int] = []
"""The bytes that were free when the outermost `measured_once` began."""


def room_for_batches(model: PreTrainedModel) -> Room:
    """Return the room for batches on a model's device: of its GPU, or of its process on this machine or container."""
    free = _MEASURED[-1] if _MEASURED else free_bytes(model.device) // processes.sharing(model.device) // _SHARE
    return Room(free, 128, 2048) if model.device.type == "cpu" else Room(free, 512, 16384, is_gpu=True)


@contextlib.contextmanager
def measured_once(model: PreTrainedModel) -> Iterator[None]:
    """Size batches inside the block by what is free at its start: in other batches, 16 bits would round otherwise."""
    _MEASURED.append(room_for_batches(model).free)
    try:
        yield
    finally:
        _MEASURED.pop()


class LargestBatch:
    """How many rows went through a model at one time, at the most; a pass that memory ended does not count."""

    def __init__(self) -> None:
        self.rows, self._now = 0, 0

    def begin(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        """Take the token ids (B, T) of a pass, as a hook of the embeddings."""
        self._now = len(given[0])

    def end(self, *_: object) -> None:
        """Count the pass, as a hook of the head."""
        self.rows = max(self.rows, self._now)


@contextlib.contextmanager
def largest_batch(model: PreTrainedModel) -> Iterator[LargestBatch]:
    """Find the largest batch of the block."""
    batch = LargestBatch()
    # Not of the model: what wraps it calls it in more than one way.
    begin = model.get_input_embeddings().register_forward_pre_hook(batch.begin)
    end = model.get_output_embeddings().register_forward_hook(batch.end)
    try:
        yield batch
    finally:
        begin.remove()
        end.remove()


def in_halves(
    work: Callable[[Sequence[Row]], list[Answer]], rows: Sequence[Row], model: PreTrainedModel
) -> list[Answer]:
    """Do `work` on rows, or on each half of them where all together do not fit into memory after all."""
    try:
        return work(rows)
    except Exception as error:
        if len(rows) == 1 or not lacks_memory(error):
            raise
    # Outside the handler, whose error holds on to the tensors of the batch.
    release_cached(model.device)
    half = len(rows) // 2
    return [*in_halves(work, rows[:half], model), *in_halves(work, rows[half:], model)]


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys and values of so many tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(tokens * 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def row_bytes(model: PreTrainedModel, tokens: int, shared: int = 0, scored: int = 1) -> int:
    """Return the bytes that a row of tokens takes in a forward pass, after `shared` tokens whose cache it copies.

    They are its keys and values, the activations of one block, its mask, and fp32 logits of `scored` tokens.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    hidden = int(config.hidden_size)
    mlp = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    activations = tokens * itemsize * (_ACTIVATIONS[0] * hidden + _ACTIVATIONS[1] * mlp)
    logits = scored * int(config.vocab_size) * (itemsize + 8)
    return cache_bytes(model, shared + tokens) + activations + tokens * (shared + tokens) + logits
