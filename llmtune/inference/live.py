"""Rows that grow by a token a step, all at one time."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from llmtune.inference.cache import GrowingLayer, repeated
from llmtune.inference.passes import common_length, left_padded, limit_head, read_start


class LiveRows:
    """Prompts that a model has read, with the logits (B, V) of what comes next.

    What all prompts start with is read once.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        self._model = model
        shared = min(common_length(prompts), min(map(len, prompts)) - 1)
        start = read_start(model, prompts[0][:shared])
        own = [prompt[shared:] for prompt in prompts]
        ids, mask = left_padded(own, model.device)
        self._mask = functional.pad(mask, (shared, 0), value=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        self._cache = repeated(start, model.config, len(prompts), GrowingLayer)
        self.logits = self._pass(ids, self._mask, positions, self._cache)
        self._next = positions[:, -1:] + 1

    def _pass(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        with limit_head(self._model, lambda hidden: hidden[:, -1:]):
            options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
            logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask, **options).logits
        return logits[:, -1]

    def keep(self, places: Sequence[int]) -> None:
        """Leave only the rows at these places; the logits stay those of all until `grow`."""
        kept = torch.tensor(places, device=self._model.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._next = self._mask[kept], self._next[kept]

    def grow(self, tokens: torch.Tensor) -> None:
        """Add a token (B) to each row, and compute the logits of the next one."""
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        self.logits = self._pass(tokens[:, None], self._mask, self._next, self._cache)
        self._next = self._next + 1
