"""Texts with several ends, such as a question and its choices: a text is read once, and its ends go on from there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from llmtune.inference.cache import chosen, repeated
from llmtune.inference.passes import by_length, common_length, limit_head, read_start, right_padded
from llmtune.inference.room import in_halves, room_for_batches, row_bytes
from llmtune.model.tokens import angles_limit
from llmtune.working import Step


class Score(NamedTuple):
    """How likely an end is."""

    loss: float
    """Nats of all of its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


@dataclass(frozen=True)
class Question:
    """A text and its ends, as token ids."""

    text: list[int]
    ends: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """The place of each end among the rows that the question was made of."""


def find_questions(rows: Sequence[tuple[Sequence[int], Sequence[int]]], config: PreTrainedConfig) -> list[Question]:
    """Return the texts that have several ends; rows are texts with one end each, and have to be read whole else."""
    by_text: dict[tuple[int, ...], Question] = {}
    limit = angles_limit(config)
    for place, (text, end) in enumerate(rows):
        if len(text) > 1 and end and (limit is None or len(text) + len(end) <= limit):
            question = by_text.setdefault(tuple(text), Question(list(text)))
            question.ends.append(list(end))
            question.places.append(place)
    return [question for question in by_text.values() if len(question.ends) > 1]


def score_shared(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], step: Step | None = None
) -> dict[int, Score]:
    """Return the scores, by place, of those rows whose text others have too; rows are texts with one end each."""
    questions = find_questions(rows, model.config)
    return {
        place: score
        for question, scores in zip(questions, score_ends(model, questions, step), strict=True)
        for place, score in zip(question.places, scores, strict=True)
    }


@torch.no_grad()
def score_ends(model: PreTrainedModel, questions: Sequence[Question], step: Step | None = None) -> list[list[Score]]:
    """Return the score of each end of each question, computed in fp32; `step` is told how many ends are done.

    What all texts start with is read once too. The model has to satisfy `shares_start`.
    """
    if not questions:
        return []
    texts = [question.text for question in questions]
    # The last token stays with its text: its output predicts the first token of the ends.
    shared = min(common_length(texts), min(map(len, texts)) - 1) if len(texts) > 1 else 0
    read = partial(_read, model, read_start(model, texts[0][:shared]), shared)
    scores: list[list[Score]] = [[] for _ in questions]
    for batch in by_length([len(text) - shared for text in texts], _fitting(model, shared, ends=False)):
        asked = [questions[place] for place in batch]
        for place, of_question in zip(batch, in_halves(read, asked, model), strict=True):
            scores[place] = of_question
        if step:
            step(sum(len(question.ends) for question in asked))
    return scores


def _read(model: PreTrainedModel, start: Cache | None, shared: int, questions: Sequence[Question]) -> list[list[Score]]:
    """Read texts after the start that they share, then the ends that go on after their first token."""
    ids, mask = right_padded([question.text[shared:] for question in questions], model.device)
    last = mask.sum(1) - 1
    cache = repeated(start, model.config, len(questions))
    mask = functional.pad(mask, (shared, 0), value=1)
    each = torch.arange(len(questions), device=model.device)
    logits = _pass(model, ids, mask, mask.cumsum(1)[:, shared:] - 1, cache, lambda hidden: hidden[each, last])
    ends = [(place, end) for place, question in enumerate(questions) for end in question.ends]
    owners = torch.tensor([place for place, _ in ends], device=model.device)
    firsts = torch.tensor([end[0] for _, end in ends], device=model.device)
    losses, greedy = _compared(logits[owners], firsts)
    longer = [number for number, (_, end) in enumerate(ends) if len(end) > 1]
    lengths = [len(ends[number][1]) - 1 for number in longer]
    for batch in by_length(lengths, _fitting(model, mask.shape[1], ends=True)) if longer else ():
        numbers = [longer[place] for place in batch]
        own = owners[numbers]
        after = chosen(cache, model.config, own)
        more, all_greedy = _read_ends(model, [ends[number][1] for number in numbers], mask[own], after)
        losses[numbers] += more
        greedy[numbers] &= all_greedy
    scores = map(Score, losses.tolist(), greedy.tolist())
    return [[next(scores) for _ in question.ends] for question in questions]


def _read_ends(
    model: PreTrainedModel, ends: Sequence[list[int]], before: torch.Tensor, cache: Cache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss (B) of ends without their first token, and whether all of the others are greedy (B)."""
    ids, own = right_padded([end[:-1] for end in ends], model.device)
    targets, _ = right_padded([end[1:] for end in ends], model.device)
    mask = torch.cat([before, own], dim=1)
    positions = (mask.cumsum(1) - 1)[:, before.shape[1] :]
    scored = own.bool()
    logits = _pass(model, ids, mask, positions, cache, lambda hidden: hidden[scored])
    losses, greedy = _compared(logits, targets[scored])
    owners = scored.nonzero()[:, 0].cpu()
    # On the CPU, as a GPU adds in an order that changes from call to call.
    sums = torch.zeros(len(ends), dtype=torch.float64).index_add_(0, owners, losses)
    wrong = torch.zeros(len(ends)).index_add_(0, owners, (~greedy).float())
    return sums, wrong == 0


def _compared(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target (N) by logits (N, V), and whether it is the likeliest token, on the CPU."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses.double().cpu(), (logits.argmax(-1) == targets).cpu()


def _pass(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    select: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    with limit_head(model, select):
        options: dict[str, Any] = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    return logits


def _fitting(model: PreTrainedModel, before: int, ends: bool) -> Callable[[int, int], bool]:
    """Return what tells whether rows of so many tokens, after so many `before`, are a batch on the model's device.

    Texts and their ends lie in memory at one time and take half of the room each.
    """
    room = room_for_batches(model)

    def fits(rows: int, tokens: int) -> bool:
        bytes_per_row = row_bytes(model, tokens, before, tokens if ends else 1)
        return rows * tokens <= room.tokens and rows <= room.fitting(2 * bytes_per_row)

    return fits
