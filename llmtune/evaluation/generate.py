"""Greedy answers and answer losses in batches; tokens that all rows start with are computed once."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmtune.data.batches.collate import Collator
from llmtune.data.encoding.encode import IGNORED, Example
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.inference.room import cache_bytes, fitting_rows, free_for_batches, row_bytes
from llmtune.working import Step

CACHE_BYTES = 2**30
NEAR = 0.1
"""How far logits of a padded row may be from its own, relative in the norm: 16 bits round to a few hundredths."""
LOSS_TOKENS, GPU_LOSS_TOKENS = 2048, 16384


def shares_start(model: PreTrainedModel) -> bool:
    """Tell whether rows may share a start: rotary positions, so padding may follow it, and full attention."""
    layers = DynamicCache(config=model.config).layers
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    return bool(rotary) and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def hides_left_padding(model: PreTrainedModel) -> bool:
    """Tell whether a row answers as it does alone beside a longer one; RWKV, for one, reads padding as text."""
    short, long = [1, 2, 3], [1, 2, 3, 1, 2, 3, 1]
    alone, beside = (_first_logits(model, rows)[0] for rows in ([short], [short, long]))
    return bool((alone - beside).norm() <= NEAR * alone.norm())


def _first_logits(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """The logits (B, V) of the first token that a model generates after some rows, centered."""
    ids, mask = left_padded(rows, model.device)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits: torch.Tensor = model.generate(ids, attention_mask=mask, pad_token_id=0, **options).logits[0].float()
    return logits - logits.mean(-1, keepdim=True)


def rows_per_batch(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """Return the batch size for answers whose rows grow to `tokens` tokens: what fits into a GPU's free memory.

    On a CPU, keys and values stay near 1 GiB, and a batch has at most 128 rows.
    """
    free = free_for_batches(model)
    if free is None:
        limit = max(1, min(128, CACHE_BYTES // cache_bytes(model, tokens)))
    else:
        limit = fitting_rows(free, row_bytes(model, tokens))
    batches = -(-rows // limit)
    return -(-rows // batches)


@contextlib.contextmanager
def limit_head(model: PreTrainedModel, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Compute logits only for what `select` takes of the hidden states (B, T, H)."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, arguments: (select(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


Choose = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Chooses the next tokens (B,) by logits (B, V) of the rows at these places in a batch."""


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: list[list[int]],
    stop: set[int],
    new_tokens: int,
    step: Step | None = None,
    choose: Choose | None = None,
) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, at most `new_tokens`, the first stop token included.

    The model has to satisfy `shares_start`. `step` is told how many prompts are done, with shares of the others.
    `choose` takes other tokens than the likeliest ones.
    """
    shared = min(_common_length(prompts), min(map(len, prompts)) - 1)
    start = _key_value_cache(model, prompts[0][:shared])
    cache = _copies(start, len(prompts)) if start else DynamicCache(config=model.config)
    ids, mask = left_padded([prompt[shared:] for prompt in prompts], model.device)
    mask = functional.pad(mask, (shared, 0), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    ended: set[int] = set()
    done = 0.0
    with limit_head(model, lambda hidden: hidden[:, -1:]):
        for length in range(1, new_tokens + 1):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits = output.logits[:, -1]
            tokens = choose(logits, live) if choose else logits.argmax(-1)
            for row, token in zip(live, tokens.tolist(), strict=True):
                if row not in ended:
                    answers[row].append(token)
                    if token in stop:
                        ended.add(row)
            if step:
                before, done = done, len(ended) + (len(prompts) - len(ended)) * length / new_tokens
                step(done - before)
            if ended.issuperset(live):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = functional.pad(mask, (0, 1), value=1)
            # Ended rows leave in groups: each time, the cache of the others is copied.
            if sum(row in ended for row in live) * 8 >= len(live):
                remaining = torch.tensor(
                    [place for place, row in enumerate(live) if row not in ended], device=ids.device
                )
                cache.batch_select_indices(remaining)
                ids, positions, mask = ids[remaining], positions[remaining], mask[remaining]
                live = [row for row in live if row not in ended]
    return answers


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel, examples: list[Example], pad_id: int, step: Step | None = None
) -> list[float]:
    """Return the summed negative log-likelihood, in nats, of each example's supervised tokens, computed in fp32."""
    if not examples:
        return []
    if isinstance(model, VllmModel):
        return model.losses(examples)
    first = min(next(place for place, label in enumerate(row.labels) if label != IGNORED) for row in examples)
    common = _common_length([example.input_ids for example in examples])
    # The last prompt token stays with the rows: its output predicts the answer's first token.
    shared = max(0, min(common, first - 1)) if shares_start(model) else 0
    start = _key_value_cache(model, examples[0].input_ids[:shared])
    rest = [{"input_ids": row.input_ids[shared:], "labels": row.labels[shared:]} for row in examples]
    losses = [0.0] * len(examples)
    for batch in _batches([len(row["input_ids"]) for row in rest], _loss_batch(model, shared)):
        padded = Collator(pad_id)([rest[index] for index in batch])
        tensors = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        for index, loss in zip(batch, _batch_losses(model, tensors, start), strict=True):
            losses[index] = loss
        if step:
            step(len(batch))
    return losses


@torch.no_grad()
def has_finite_logits(model: PreTrainedModel, tokens: list[int]) -> bool:
    """Tell whether the model's answer to some tokens is one: logits without NaN, the largest of them finite."""
    if isinstance(model, VllmModel):
        return model.is_finite(tokens)
    with limit_head(model, lambda hidden: hidden[:, -1:]):
        logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits.float()
    return bool(torch.isfinite(logits.max()))


def _common_length(rows: list[list[int]]) -> int:
    """Count the tokens that all rows start with."""
    first, last = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _loss_batch(model: PreTrainedModel, shared: int) -> Callable[[int, int], bool]:
    """Return what tells whether rows of so many tokens, after `shared` ones, are a batch on the model's device."""
    free = free_for_batches(model)
    if free is None:
        return lambda rows, tokens: rows * tokens <= LOSS_TOKENS
    return lambda rows, tokens: (
        rows * tokens <= GPU_LOSS_TOKENS and rows <= fitting_rows(free, row_bytes(model, tokens, shared, tokens))
    )


def _batches(lengths: list[int], fits: Callable[[int, int], bool]) -> Iterator[list[int]]:
    """Group indices by rising length, each group of rows that fit when padded to its longest."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and not fits(len(batch) + 1, lengths[index]):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _batch_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor], start: DynamicCache | None) -> list[float]:
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    mask, cached = batch["attention_mask"], dict[str, Any]()
    if start is not None:
        cache, shared = _copies(start, len(mask)), start.get_seq_length()
        # Without positions, vision-language models take those of the rows that they generated for last.
        positions = torch.arange(shared, shared + mask.shape[1], device=mask.device).expand_as(mask)
        cached = {"past_key_values": cache, "position_ids": positions}
        mask = functional.pad(mask, (shared, 0), value=1)
    with limit_head(model, lambda hidden: hidden[:, :-1][supervised]):
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=start is not None, **cached).logits
    losses = functional.cross_entropy(logits.float(), targets[supervised], reduction="none")
    # On the CPU, as a GPU adds in an order that changes from call to call.
    sums = torch.zeros(len(mask), dtype=torch.float64)
    sums.index_add_(0, supervised.nonzero()[:, 0].cpu(), losses.double().cpu())
    return sums.tolist()


def _key_value_cache(model: PreTrainedModel, tokens: list[int]) -> DynamicCache | None:
    """Compute keys and values of the tokens that rows share; None without any."""
    if not tokens:
        return None
    cache = DynamicCache(config=model.config)
    with limit_head(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _copies(start: DynamicCache, rows: int) -> DynamicCache:
    """Repeat the cache of one row for `rows` rows; `start` stays as it is."""
    cache = copy.deepcopy(start)
    cache.batch_repeat_interleave(rows)
    return cache


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, LongTensors (B, T) padded on the left with zeros."""
    width = max(map(len, rows))
    ids = [[*[0] * (width - len(row)), *row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
