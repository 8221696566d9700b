"""Passes without gradients: which rows go together, how they are padded, and which positions get logits."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import Cache, PreTrainedModel

from llmtune.inference.cache import empty_cache


@contextlib.contextmanager
def limit_head(model: PreTrainedModel, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Compute logits only for what `select` takes of the hidden states (B, T, H)."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, arguments: (select(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


def common_length(rows: Sequence[list[int]]) -> int:
    """Count the tokens that all rows start with."""
    first, last = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def by_length(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> Iterator[list[int]]:
    """Group indices by rising length; `fits` tells whether so many rows, padded to so many tokens, may be a group."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and not fits(len(batch) + 1, lengths[index]):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, LongTensors (B, T) padded on the left with zeros."""
    width = max(map(len, rows))
    ids = [[*[0] * (width - len(row)), *row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, LongTensors (B, T) padded on the right with zeros."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def read_start(model: PreTrainedModel, tokens: list[int]) -> Cache | None:
    """Return the keys and values (1, H, T, D) of the tokens that rows share; None without any."""
    if not tokens:
        return None
    cache = empty_cache(model.config)
    with limit_head(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
    return cache
