"""Held-out rows as questions to a model: which fit into its context, zero-shot and after worked examples."""

import heapq
import itertools
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import encode, prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.example import IGNORED, Example
from llmtune.data.findings import format_ids
from llmtune.data.gate import Gate
from llmtune.data.row import Row
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.held_out.choice import AnswerFacts, choose
from llmtune.evaluation.held_out.truth import Truth, TruthReader
from llmtune.recipe.data import Data
from llmtune.recipe.sections import Recipe

ANSWER_ROOM = 1.5
"""How much longer than the longest true answer an answer may be."""
_LONGEST_ROWS = 8
"""The longest questions, which must fit into the context together with the worked examples."""
_BATCH = 1000
"""Rows that are encoded at one time."""


@dataclass(frozen=True)
class Questions:
    """Held-out rows as a model reads them."""

    rows: list[Row]
    prompt_ids: Sequence[Sequence[int]]
    """The token ids that generation starts from."""
    prompts: list[str]
    """The same as text."""
    examples: list[Example]
    """The rows for the loss: only the last answer is supervised."""
    truths: list[Truth]
    """The true answers."""
    special: bool
    """Whether answers keep their special tokens, as the true ones have some."""
    of: int
    """Held-out rows that there are; the recipe may limit how many are used, and some may be too long."""
    shots: list[str]
    """Ids of the worked examples."""
    not_asked: list[str]
    """Ids of rows that are longer than the context."""


@dataclass
class Survey:
    """What is to be known of all questions before any is asked."""

    asked: int = 0
    not_asked: list[str] = field(default_factory=list)
    answer_tokens: int = 1
    """Tokens of the longest true answer with its thought and its stop token."""
    longest: list[tuple[int, int, Row]] = field(default_factory=list)
    """The longest questions: tokens of the prompt, the row's number, the row."""
    tools: set[str] = field(default_factory=set)
    """The lists of tools that questions have, as JSON."""
    answers: AnswerFacts = field(default_factory=AnswerFacts)
    """What decides which metrics apply to the true answers."""

    @property
    def of(self) -> int:
        """The rows that there are."""
        return self.asked + len(self.not_asked)

    def add(self, questions: Questions) -> "Survey":
        """Count some more questions."""
        for row, prompt, example in zip(questions.rows, questions.prompt_ids, questions.examples, strict=True):
            self.asked += 1
            self.answer_tokens = max(self.answer_tokens, len(example.input_ids) - example.prompt_size)
            self.tools.add(_tools(row))
            heapq.heappush(self.longest, (len(prompt), -self.asked, row))
            if len(self.longest) > _LONGEST_ROWS:
                heapq.heappop(self.longest)
        for truth in questions.truths:
            self.answers.add(truth.final, truth.is_call, bool(truth.thought_end))
        self.not_asked += questions.not_asked
        return self


def asking_rules(data: Data, context: int) -> Rules:
    """The rules by which held-out rows are encoded: they are asked for their last answer."""
    return Rules(context, "drop", "last_answer", data.reasoning, data.template)


def questions(
    rows: Sequence[Row],
    shots: Sequence[Row],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    rules: Rules,
) -> Questions:
    """Encode the first `limit` rows, each after the worked examples `shots`, for a context of `max_length` tokens.

    Rows that are longer than the context are left out; raises RecipeError for one that cannot be asked at all.
    """
    complete = [_with_shots(shots, row) for row in rows[:limit]]
    examples: list[Example] = []
    not_asked: list[str] = []
    for start in range(0, len(complete), _BATCH):
        encoded = encode(complete[start : start + _BATCH], tokenizer, stop, rules)
        examples += map(last_answer_alone, encoded.examples)
        not_asked += encoded.dropped
    by_place = {row.where: row for row in complete}
    asked = [by_place[example.where] for example in examples]
    truths = TruthReader(examples, tokenizer, stop)
    ids = [example.input_ids[: example.prompt_size] for example in examples]
    return Questions(
        rows=asked,
        prompt_ids=ids,
        prompts=[str(tokenizer.decode(prompt)) for prompt in ids],
        examples=examples,
        truths=[truths.read(row, example) for row, example in zip(asked, examples, strict=True)],
        special=truths.keeps_special,
        of=len(rows),
        shots=[row.id for row in shots],
        not_asked=not_asked,
    )


def few_shot_questions(
    zero_shot: Questions, shots: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], rules: Rules
) -> Questions:
    """Ask the rows that are asked zero-shot once more, each after the worked examples."""
    few_shot = questions(zero_shot.rows, shots, None, tokenizer, stop, rules)
    return replace(few_shot, of=zero_shot.of, not_asked=[*zero_shot.not_asked, *few_shot.not_asked])


def fitting_shots(
    shots: Sequence[Row], survey: Survey, tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> tuple[list[Row], list[str]]:
    """Return the worked examples that fit into the context before every question, and a note where not all do.

    The longest go first. A question needs room for its answer too. An example with other tools than the questions'
    cannot be a turn before them, nor can a plain text.
    """
    chats = [row for row in shots if row.messages]
    alike = [row for row in chats if survey.tools == {_tools(row)}]
    if chats and not alike:
        return [], ["few-shot is left out: the worked examples have other tools than the questions"]
    try:
        kept = _within(alike, survey, tokenizer, rules)
    except RecipeError as error:
        return [], [f"few-shot is left out: {error}"]
    if len(kept) == len(chats):
        return kept, []
    context = f"the model's context of {rules.max_length} tokens"
    if not kept:
        return [], [f"few-shot is left out: no worked example fits into {context}"]
    reason = f"more do not fit into {context}" if len(kept) < len(alike) else "the others have other tools"
    return kept, [f"few-shot: {len(kept)} worked examples, not {len(chats)}: {reason}"]


def check_questions(
    recipe: Recipe, data: Gate, tokenizer: PreTrainedTokenizerBase, stop: set[int], context: int
) -> list[str]:
    """Put every held-out row through template and tokenizer; returns notes about what is not asked.

    Raises RecipeError for a row that cannot be asked, FieldError where all rows are longer than the context.
    """
    rules, survey = asking_rules(recipe.data, context), Survey()
    chats = (row for row in data.test if row.messages)
    while batch := list(itertools.islice(chats, _BATCH)):
        survey.add(questions(batch, [], None, tokenizer, stop, rules))
    if recipe.eval.suite == "none" or not len(data.test):
        return []
    if survey.of and not survey.asked:
        reason = f"all {survey.of} held-out rows are longer than the model's context of {context} tokens"
        ids = format_ids(survey.not_asked)
        message = f"{reason} ({ids}); shorten them, or set eval.suite: none"
        raise FieldError(f"data.{recipe.data.held_out_part}", message)
    choose(recipe.eval.metrics, survey.answers, data.rows.get("train", ()))
    if not survey.of:
        return []
    return long_rows_notes(survey, context) + fitting_shots(data.shots, survey, tokenizer, rules)[1]


def answer_room(survey: Survey, context: int) -> int:
    """Return how many tokens of the context are for the answer: 1.5 times the longest true one, at most half of it."""
    return min(math.ceil(ANSWER_ROOM * survey.answer_tokens), context // 2)


def context_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was made for, 2048 where its configuration does not say."""
    text: Any = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 2048)


def asking_context(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Return how many tokens a question may have with its answer: vLLM needs room for one more than it reads."""
    return context_length(config) - (recipe.eval.backend == "vllm")


def long_rows_notes(survey: Survey, context: int) -> list[str]:
    """Return a warning that names the rows that are not asked, if there are any."""
    if not survey.not_asked:
        return []
    rows = (
        f"{len(survey.not_asked)} of {survey.of} held-out rows are longer than the model's context of {context} tokens"
    )
    return [f"warning: {rows} and are not asked ({format_ids(survey.not_asked)})"]


def _within(shots: list[Row], survey: Survey, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> list[Row]:
    """Return the shots that fit before the longest questions; raises RecipeError where the template rejects them."""
    room = answer_room(survey, rules.max_length)

    def fit(kept: list[Row]) -> bool:
        asked = [_with_shots(kept, row) for _, _, row in survey.longest]
        sizes = (len(prompt_ids(row.prompt, tokenizer, rules.template, row.tools)) for row in asked)
        return all(size + room <= rules.max_length for size in sizes)

    kept = list(shots)
    while kept and not fit(kept):
        kept.remove(max(kept, key=_characters))
    return kept


def last_answer_alone(example: Example) -> Example:
    """Return an example that learns its last answer alone, in a tenth of the memory: all of them are held."""
    labels = [IGNORED] * example.prompt_size + example.labels[example.prompt_size :]
    ids, labels = (cast("list[int]", array("i", values)) for values in (example.input_ids, labels))
    return replace(example, input_ids=ids, labels=labels)


def _with_shots(shots: Sequence[Row], row: Row) -> Row:
    """Put worked examples as earlier turns between a row's system message and its own turns."""
    system = row.messages[: int(row.messages[0]["role"] in ("system", "developer"))]
    turns = tuple(turn for shot in shots for turn in shot.messages if turn["role"] not in ("system", "developer"))
    return replace(row, messages=(*system, *turns, *row.messages[len(system) :]))


def _tools(row: Row) -> str:
    return json.dumps(row.tools, sort_keys=True)


def _characters(row: Row) -> int:
    return len(json.dumps(row.messages))
