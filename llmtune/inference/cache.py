"""Keys and values of rows that a model reads together: the start that they share, and what each has of its own."""

from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

STEPS = 32
"""Tokens for which rows that grow have room, before their keys and values are copied into larger buffers."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in buffers with room: a step writes its own token and copies no other."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values (B, H, T, D); returns all of them, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            new = [_buffer(states, end + STEPS) for states in (key_states, value_states)]
            for buffer, known in zip(new, (self.keys, self.values), strict=True):
                if length:
                    buffer[..., :length, :] = known
            self._buffers = new
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at these places."""
        length = self.get_seq_length()
        if length:
            self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
            self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)


def empty_cache(config: PreTrainedConfig, layer: type[DynamicLayer] = DynamicLayer) -> Cache:
    """Return a cache for a model whose layers keep every token."""
    return Cache(layers=[layer() for _ in DynamicCache(config=config).layers])


def repeated(
    start: Cache | None, config: PreTrainedConfig, rows: int, layer: type[DynamicLayer] = DynamicLayer
) -> Cache:
    """Return a cache in which each of some rows begins with the one row of `start`, which is copied when they go on."""
    return _begun(start, config, layer, lambda states: states.expand(rows, -1, -1, -1))


def chosen(start: Cache, config: PreTrainedConfig, places: torch.Tensor) -> Cache:
    """Return a cache whose rows begin with those of `start` at these places, of which one may stand several times."""
    return _begun(start, config, DynamicLayer, lambda states: states.index_select(0, places))


def _begun(
    start: Cache | None,
    config: PreTrainedConfig,
    layer: type[DynamicLayer],
    take: Callable[[torch.Tensor], torch.Tensor],
) -> Cache:
    cache = empty_cache(config, layer)
    for mine, other in zip(cache.layers, start.layers if start else (), strict=False):
        if other.is_initialized:
            mine.lazy_initialization(other.keys, other.values)
            mine.keys, mine.values = take(other.keys), take(other.values)
    return cache


def _buffer(states: torch.Tensor, tokens: int) -> torch.Tensor:
    rows, heads, _, size = states.shape
    return states.new_empty(rows, heads, tokens, size)
