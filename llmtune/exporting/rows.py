"""The rows whose answers are compared, as token ids, and greedy answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.first_rows import first_rows
from llmtune.evaluation.generate import greedy
from llmtune.evaluation.questions import Survey, answer_room, asking_rules, questions
from llmtune.inference.room import in_halves
from llmtune.recipe.sections import Recipe
from llmtune.working import working

ROWS = 20
"""How many rows are answered."""
_TOKENS, _START = 256, 64
"""Tokens of an answer at most, and of a plain text's start that is its prompt."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of a run's rows as token ids, and how long an answer may be."""

    ids: list[list[int]]
    new_tokens: int
    stop: set[int]


def prompts_of(settings: Recipe, tokenizer: PreTrainedTokenizerBase, stop: set[int], context: int) -> Prompts:
    """The first 20 rows of the recipe's test rows, else its eval rows, else its training rows, as prompts.

    A plain text is continued after its start. There are none where no row can be read.
    """
    data = settings.data
    rows = list(islice(first_rows(data, data.held_out_part, ROWS), ROWS))
    chats = [row for row in rows if row.messages]
    asking = questions(chats, [], None, tokenizer, stop, asking_rules(data, context))
    ids = [list(prompt) for prompt in asking.prompt_ids]
    starts = [tokenizer(row.text).input_ids[:_START] for row in rows if row.text is not None]
    room = answer_room(Survey().add(asking), context) if chats else _START
    return Prompts([*ids, *filter(None, starts)], min(room, _TOKENS), stop)


def answers(model: PreTrainedModel, prompts: Prompts, name: str) -> list[list[int]]:
    """A model's greedy answers as token ids, each up to its first stop token; `name` says whose."""
    if not prompts.ids:
        return []
    with working(f"answering rows with {name}", len(prompts.ids), "rows") as step, torch.inference_mode():

        def answer(rows: Sequence[list[int]]) -> list[list[int]]:
            return greedy(model, rows, prompts.stop, prompts.new_tokens, step)

        return in_halves(answer, prompts.ids, model)
