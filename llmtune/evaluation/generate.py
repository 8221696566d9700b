"""Greedy answers and answer losses in batches; tokens that all rows start with are computed once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmtune.data.batches.collate import Collator
from llmtune.data.encoding.encode import IGNORED, Example
from llmtune.errors import ProofError
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.inference.cache import repeated
from llmtune.inference.ends import score_shared
from llmtune.inference.generated import Choose, generated
from llmtune.inference.live import LiveRows
from llmtune.inference.passes import by_length, common_length, left_padded, limit_head, read_start
from llmtune.inference.room import in_halves, room_for_batches, row_bytes
from llmtune.working import Step

NEAR = 0.1
"""How far logits of a padded row may be from its own, relative in the norm: 16 bits round to a few hundredths."""


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
    """Return the batch size for answers whose rows grow to `tokens` tokens: what fits into free memory."""
    room = room_for_batches(model)
    limit = min(room.answers, room.fitting(row_bytes(model, tokens)))
    batches = -(-rows // limit)
    return -(-rows // batches)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop: set[int],
    new_tokens: int,
    step: Step | None = None,
    choose: Choose | None = None,
) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, at most `new_tokens`, the first stop token included.

    Each answer is the one that its prompt gets alone. `step` is told how many prompts are done, with shares of the
    others. `choose` takes other tokens than the likeliest ones.
    """
    if shares_start(model):
        return _after_shared_start(model, prompts, stop, new_tokens, step, choose)
    places = range(len(prompts))
    together = len(set(map(len, prompts))) == 1 or hides_left_padding(model)
    batches: list[Sequence[int]] = [places] if together else [[place] for place in places]
    answers: list[list[int]] = []
    for batch in batches:
        answers += generated(model, [prompts[place] for place in batch], stop, new_tokens, choose, batch)
        if step:
            step(len(batch))
    return answers


def _after_shared_start(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop: set[int],
    new_tokens: int,
    step: Step | None,
    choose: Choose | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    done = 0.0

    def tell() -> None:
        nonlocal done
        shares = (1 if _has_ended(one, stop, new_tokens) else len(one) / new_tokens for one in answers)
        before, done = done, sum(shares)
        if step:
            step(done - before)

    rows = LiveRows(model, prompts)
    while True:
        tokens = choose(rows.logits, live) if choose else rows.logits.argmax(-1)
        for row, token in zip(live, tokens.tolist(), strict=True):
            if not _has_ended(answers[row], stop, new_tokens):
                answers[row].append(token)
        tell()
        going = [place for place, row in enumerate(live) if not _has_ended(answers[row], stop, new_tokens)]
        if not going:
            return answers
        # Ended rows leave in groups: each time, the cache of the others is copied.
        if (len(live) - len(going)) * 8 >= len(live):
            rows.keep(going)
            tokens, live = tokens[going], [live[place] for place in going]
        rows.grow(tokens)


def _has_ended(answer: Sequence[int], stop: set[int], new_tokens: int) -> bool:
    return len(answer) >= new_tokens or bool(answer and answer[-1] in stop)


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel, examples: list[Example], pad_id: int, step: Step | None = None
) -> list[float]:
    """Return the summed negative log-likelihood, in nats, of each example's supervised tokens, computed in fp32.

    A prompt of several examples is read once, as is what all start with.
    """
    if isinstance(model, VllmModel):
        return model.losses(examples) if examples else []
    known = score_shared(model, [_text_and_end(row) for row in examples], step) if shares_start(model) else {}
    others = [row for place, row in enumerate(examples) if place not in known]
    rest = iter(_losses_of_rows(model, others, pad_id, step))
    return [known[place].loss if place in known else next(rest) for place in range(len(examples))]


def _text_and_end(example: Example) -> tuple[Sequence[int], Sequence[int]]:
    """Cut a row before its first supervised token; there is no end where others after it are not supervised."""
    first = _first_supervised(example)
    text, end = example.input_ids[:first], example.input_ids[first:]
    return text, end if list(end) == list(example.labels[first:]) else []


def _first_supervised(example: Example) -> int:
    return next(place for place, label in enumerate(example.labels) if label != IGNORED)


def _losses_of_rows(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, step: Step | None) -> list[float]:
    if not examples:
        return []
    common = common_length([example.input_ids for example in examples])
    # The last prompt token stays with the rows: its output predicts the answer's first token.
    shared = max(0, min(common, min(map(_first_supervised, examples)) - 1)) if shares_start(model) else 0
    start = read_start(model, examples[0].input_ids[:shared])
    rest = [{"input_ids": row.input_ids[shared:], "labels": row.labels[shared:]} for row in examples]

    def read(batch: Sequence[int]) -> list[float]:
        padded = Collator(pad_id)([rest[index] for index in batch])
        tensors = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        return _batch_losses(model, tensors, start)

    losses = [0.0] * len(examples)
    for batch in by_length([len(row["input_ids"]) for row in rest], _loss_batch(model, shared)):
        for index, loss in zip(batch, in_halves(read, batch, model), strict=True):
            losses[index] = loss
        if step:
            step(len(batch))
    return losses


def refuse_broken(model: PreTrainedModel, tokens: list[int], name: str) -> None:
    """Raise ProofError for a model, base or tuned, whose logits after some tokens are no finite numbers."""
    if not _has_finite_logits(model, tokens):
        dtype = str(model.dtype).removeprefix("torch.")
        remedy = "train again at a lower rate" if name == "tuned" else "a base in that precision cannot be used here"
        raise ProofError(f"the {name} model's logits are not finite in {dtype}, so it has no answers; {remedy}")


@torch.no_grad()
def _has_finite_logits(model: PreTrainedModel, tokens: list[int]) -> bool:
    """Tell whether the model's answer to some tokens is one: logits without NaN, the largest of them finite."""
    if isinstance(model, VllmModel):
        return model.is_finite(tokens)
    with limit_head(model, lambda hidden: hidden[:, -1:]):
        logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits.float()
    return bool(torch.isfinite(logits.max()))


def _loss_batch(model: PreTrainedModel, shared: int) -> Callable[[int, int], bool]:
    """Return what tells whether rows of so many tokens, after `shared` ones, are a batch on the model's device."""
    room = room_for_batches(model)

    def fits(rows: int, tokens: int) -> bool:
        return rows * tokens <= room.tokens and rows <= room.fitting(row_bytes(model, tokens, shared, tokens))

    return fits


def _batch_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor], start: Cache | None) -> list[float]:
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    mask, cached = batch["attention_mask"], dict[str, Any]()
    if start is not None:
        cache, shared = repeated(start, model.config, len(mask)), start.get_seq_length()
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
