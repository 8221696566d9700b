"""Held-out rows as questions to a model: which fit into its context, zero-shot and after worked examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.findings import format_ids
from llmtune.data.gate import Gate
from llmtune.data.row import Row
from llmtune.errors import FieldError
from llmtune.recipe.sections import Recipe

_ANSWER_ROOM = 1.5
"""How much longer than the longest true answer an answer may be."""
_LONGEST_ROWS = 8
"""The longest questions, which must fit into the context together with the worked examples."""


@dataclass(frozen=True)
class Questions:
    """Held-out rows as a model reads them."""

    rows: list[Row]
    prompt_ids: list[list[int]]
    """The token ids that generation starts from."""
    prompts: list[str]
    """The same as text."""
    examples: list[Example]
    """The rows for the loss: only the last answer is supervised."""
    of: int
    """Held-out rows that there are; the recipe may limit how many are used, and some may be too long."""
    shots: list[str]
    """Ids of the worked examples."""
    not_asked: list[str]
    """Ids of rows that are longer than the context."""


def questions(
    rows: Sequence[Row],
    shots: Sequence[Row],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    context: int,
) -> Questions:
    """Encode the first `limit` rows, each after the worked examples `shots`, for a context of `context` tokens.

    Rows that are longer than the context are left out; raises RecipeError for one that cannot be asked at all.
    """
    complete = [_with_shots(shots, row) for row in rows[:limit]]
    encoded = encode(complete, tokenizer, stop, Rules(context, "drop"))
    examples = [_last_answer_alone(example) for example in encoded.examples]
    fitting = {example.where for example in examples}
    ids = [example.input_ids[: example.prompt_size] for example in examples]
    return Questions(
        rows=[row for row in complete if row.where in fitting],
        prompt_ids=ids,
        prompts=[str(tokenizer.decode(prompt)) for prompt in ids],
        examples=examples,
        of=len(rows),
        shots=[row.id for row in shots],
        not_asked=encoded.dropped,
    )


def few_shot_questions(
    zero_shot: Questions, shots: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], context: int
) -> Questions:
    """Ask the rows that are asked zero-shot once more, each after the worked examples."""
    few_shot = questions(zero_shot.rows, shots, None, tokenizer, stop, context)
    return replace(few_shot, of=zero_shot.of, not_asked=[*zero_shot.not_asked, *few_shot.not_asked])


def fitting_shots(
    shots: list[Row], zero_shot: Questions, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[Row], list[str]]:
    """Return the worked examples that fit into the context before every question, and a note where not all do.

    The longest go first. A question needs room for its answer too.
    """
    room = answer_room(zero_shot, context)
    pairs = sorted(zip(zero_shot.prompt_ids, zero_shot.rows, strict=True), key=lambda pair: -len(pair[0]))
    longest = [row for _, row in pairs[:_LONGEST_ROWS]]
    kept = list(shots)
    while kept and any(len(prompt_ids(_with_shots(kept, row).prompt, tokenizer)) + room > context for row in longest):
        kept.remove(max(kept, key=_characters))
    if len(kept) == len(shots):
        return kept, []
    if not kept:
        return [], [f"few-shot is left out: no worked example fits into the model's context of {context} tokens"]
    limit = f"more do not fit into the model's context of {context} tokens"
    return kept, [f"few-shot: {len(kept)} worked examples, not {len(shots)}: {limit}"]


def check_questions(
    recipe: Recipe, data: Gate, tokenizer: PreTrainedTokenizerBase, stop: set[int], context: int
) -> list[str]:
    """Put every held-out row through template and tokenizer; returns notes about what is not asked.

    Raises RecipeError for a row that cannot be asked, FieldError where all rows are longer than the context.
    """
    zero_shot = questions(data.test, [], None, tokenizer, stop, context)
    if recipe.eval.suite == "none":
        return []
    part = "test" if recipe.data.test else "eval" if recipe.data.eval else "train"
    if not zero_shot.rows:
        reason = f"all {zero_shot.of} held-out rows are longer than the model's context of {context} tokens"
        ids = format_ids(zero_shot.not_asked)
        raise FieldError(f"data.{part}", f"{reason} ({ids}); shorten them, or set eval.suite: none")
    return long_rows_notes(zero_shot, context) + fitting_shots(data.shots, zero_shot, tokenizer, context)[1]


def answer_limit(questions: Questions) -> int:
    """Return how many tokens an answer may have: 1.5 times the longest true one, its stop token included."""
    return math.ceil(_ANSWER_ROOM * max((example.supervised for example in questions.examples), default=1))


def answer_room(questions: Questions, context: int) -> int:
    """Return how many tokens of the context are for the answer: `answer_limit`, at most half of it."""
    return min(answer_limit(questions), context // 2)


def context_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was made for, 2048 where its configuration does not say."""
    text: Any = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 2048)


def long_rows_notes(zero_shot: Questions, context: int) -> list[str]:
    """Return a warning that names the rows that are not asked, if there are any."""
    if not zero_shot.not_asked:
        return []
    count = len(zero_shot.rows) + len(zero_shot.not_asked)
    rows = (
        f"{len(zero_shot.not_asked)} of {count} held-out rows are longer than the model's context of {context} tokens"
    )
    return [f"warning: {rows} and are not asked ({format_ids(zero_shot.not_asked)})"]


def _last_answer_alone(example: Example) -> Example:
    """Return an example that learns its last answer alone."""
    labels = [IGNORED] * example.prompt_size + example.labels[example.prompt_size :]
    return replace(example, labels=labels)


def _with_shots(shots: Sequence[Row], row: Row) -> Row:
    """Put worked examples as earlier turns between a row's system message and its own turns."""
    system = row.messages[: int(row.messages[0]["role"] == "system")]
    turns = tuple(turn for shot in shots for turn in shot.messages if turn["role"] != "system")
    return replace(row, messages=(*system, *turns, *row.messages[len(system) :]))


def _characters(row: Row) -> int:
    return sum(len(message["content"]) for message in row.messages)
