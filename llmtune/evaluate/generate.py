"""Greedy answers and answer losses in batches: a start that rows have in common is computed once."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmtune.data.collate import Collator
from llmtune.data.encode import IGNORED, Example

CACHE_BYTES = 2**30
LOSS_TOKENS = 2048


def shares_start(model: PreTrainedModel) -> bool:
    """Whether rows may share a start: rotary positions, so padding may follow it, and blocks that see all of it."""
    layers = DynamicCache(config=model.config).layers
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    return bool(rotary) and all(type(layer) is DynamicLayer for layer in layers)


def rows_per_batch(model: PreTrainedModel, rows: int, tokens: int) -> int:
    """How many rows of that many tokens go into a batch whose keys and values stay near 1 GiB; batches are equal."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = tokens * 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    most = max(1, min(128, CACHE_BYTES // row))
    return -(-rows // -(-rows // most))


@contextlib.contextmanager
def head_reads(model: PreTrainedModel, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let the output layer see only what `select` gives of the hidden states (B, T, H): no other logits are made."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, arguments: (select(arguments[0]), *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: list[list[int]], stop: set[int], new_tokens: int) -> list[list[int]]:
    """Likeliest tokens after each prompt, up to and with a stop token, at most `new_tokens`; for models that share."""
    shared = min(_common(prompts), min(map(len, prompts)) - 1)
    start = _start(model, prompts[0][:shared])
    cache = _copies(start, len(prompts)) if start else DynamicCache(config=model.config)
    ids, mask = left_padded([prompt[shared:] for prompt in prompts], model.device)
    mask = functional.pad(mask, (shared, 0), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    ended: set[int] = set()
    with head_reads(model, lambda hidden: hidden[:, -1:]):
        for _ in range(new_tokens):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            chosen = output.logits[:, -1].argmax(-1)
            for row, token in zip(live, chosen.tolist(), strict=True):
                if row not in ended:
                    answers[row].append(token)
                    if token in stop:
                        ended.add(row)
            if ended.issuperset(live):
                break
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = functional.pad(mask, (0, 1), value=1)
            # Rows leave in groups: each time, what is kept of the others is copied.
            if sum(row in ended for row in live) * 8 >= len(live):
                kept = torch.tensor([place for place, row in enumerate(live) if row not in ended], device=ids.device)
                cache.batch_select_indices(kept)
                ids, positions, mask = ids[kept], positions[kept], mask[kept]
                live = [row for row in live if row not in ended]
    return answers


@torch.no_grad()
def answer_losses(model: PreTrainedModel, examples: list[Example], pad_id: int) -> list[float]:
    """The summed negative log-likelihood, in nats, of each example's supervised tokens."""
    if not examples:
        return []
    first = min(next(place for place, label in enumerate(row.labels) if label != IGNORED) for row in examples)
    common = _common([example.input_ids for example in examples])
    # The last prompt token is left to the rows: its output predicts the answer's first token.
    shared = max(0, min(common, first - 1)) if shares_start(model) else 0
    start = _start(model, examples[0].input_ids[:shared])
    rest = [{"input_ids": row.input_ids[shared:], "labels": row.labels[shared:]} for row in examples]
    found = [0.0] * len(examples)
    for batch in _batches([len(row["input_ids"]) for row in rest]):
        padded = Collator(pad_id)([rest[index] for index in batch])
        losses = _batch_losses(model, {name: tensor.to(model.device) for name, tensor in padded.items()}, start)
        for index, loss in zip(batch, losses, strict=True):
            found[index] = loss
    return found


def _common(rows: list[list[int]]) -> int:
    """How many tokens all rows start with in common."""
    first, last = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Indices by rising length in groups of at most LOSS_TOKENS padded tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > LOSS_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _batch_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor], start: DynamicCache | None) -> list[float]:
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORED
    mask, more = batch["attention_mask"], {}
    if start is not None:
        cache = _copies(start, len(mask))
        mask, more = functional.pad(mask, (cache.get_seq_length(), 0), value=1), {"past_key_values": cache}
    with head_reads(model, lambda hidden: hidden[:, :-1][wanted]):
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=start is not None, **more).logits
    losses = functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
    sums = torch.zeros(len(mask), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, wanted.nonzero()[:, 0], losses.double())
    return sums.tolist()


def _start(model: PreTrainedModel, prefix: list[int]) -> DynamicCache | None:
    """Keys and values of a prefix, None for an empty one."""
    if not prefix:
        return None
    cache = DynamicCache(config=model.config)
    with head_reads(model, lambda hidden: hidden[:, -1:]):
        model(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _copies(start: DynamicCache, rows: int) -> DynamicCache:
    """The cache of one row, for each of `rows` rows; the given one stays as it is."""
    cache = copy.deepcopy(start)
    cache.batch_repeat_interleave(rows)
    return cache


def left_padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """LongTensors ids and mask (B, T), padded on the left with zeros."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
