"""Rows that grow by a token a step, all at one time."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from llmtune.inference.cache import GrowingLayer, empty_cache, placed, repeated
from llmtune.inference.passes import by_length, common_length, left_padded, limit_head, read_start
from llmtune.inference.room import room_for_batches


class LiveRows:
    """Prompts that a model has read, with the logits (B, V) of what comes next.

    What all prompts start with is read once; the others' tokens in passes of rows of like length, with little padding.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        self._model = model
        shared = min(common_length(prompts), min(map(len, prompts)) - 1)
        start = read_start(model, prompts[0][:shared])
        own = [prompt[shared:] for prompt in prompts]
        mask = left_padded(own, model.device)[1]
        self._mask = functional.pad(mask, (shared, 0), value=1)
        self._next = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
        most = room_for_batches(model).tokens
        groups = [sorted(group) for group in by_length(list(map(len, own)), lambda n, tokens: n * tokens <= most)]
        if len(groups) == 1:
            self._cache = repeated(start, model.config, len(own), GrowingLayer)
            self.logits = self._read(own, self._cache, shared)
        else:
            self._cache = empty_cache(model.config, GrowingLayer)
            self.logits = self._read_apart(own, groups, start, shared)

    def _read_apart(
        self, own: list[list[int]], groups: list[list[int]], start: Cache | None, shared: int
    ) -> torch.Tensor:
        length, logits = shared + max(map(len, own)), []
        for group in groups:
            part = repeated(start, self._model.config, len(group))
            logits.append(self._read([own[row] for row in group], part, shared))
            placed(self._cache, part, group, len(own), length, shared)
        order = torch.tensor([row for group in groups for row in group], device=self._model.device)
        return torch.cat(logits)[order.argsort()]

    def _read(self, rows: list[list[int]], cache: Cache, shared: int) -> torch.Tensor:
        ids, mask = left_padded(rows, self._model.device)
        mask = functional.pad(mask, (shared, 0), value=1)
        return self._pass(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, shared:], cache)

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
