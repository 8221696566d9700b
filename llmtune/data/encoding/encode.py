"""Encodes rows as token ids and labels with the model's chat template; what is learned is what the rules say.

A turn's *prompt* is the text from which generation starts: the rendered turns before it and the generation prompt.
Its *end* is the text up to its stop token. Each is tokenized alone, and the ids of both start the example's ids.
An answer that a longer conversation does not have as generation would produce it, such as one whose reasoning the
template drops later, becomes an example of its own, which ends with it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import missing_bos, tokenize
from llmtune.data.encoding.conversation import Conversation, RowTurns
from llmtune.data.encoding.labels import Labelled, label
from llmtune.data.encoding.lengths import cut_start, is_long, least_tokens
from llmtune.data.encoding.parts import Outcome, Part, add
from llmtune.data.encoding.plain import encode_texts
from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.shorten import fit, last_fitting
from llmtune.data.encoding.template import Renderer, Request
from llmtune.data.encoding.turns import Answers
from llmtune.data.encoding.untemplated import pair
from llmtune.data.example import IGNORED, Encoded, Example
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import LlmtuneError, RecipeError, one_line

__all__ = ["IGNORED", "Encoded", "Example", "encode", "prompt_ids"]

_BATCH = 256
"""Rows that are tokenized in one call."""
_BEGINNING = 1000
"""Characters by which a long text is asked whether it starts with BOS."""


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    block: str = "",
    reasoning: str = "learn",
) -> list[int]:
    """Return the token ids from which generation after `messages` starts, rendered as training renders them.

    `template` and `reasoning` are the values of `data.template` and `data.reasoning`; `block` is the empty thinking
    block behind which the answers start that were trained (`Encoded.thinking_block`).
    """
    if tokenizer.chat_template:
        answers = Answers(Renderer(tokenizer, template or {}), (), Rules(sys.maxsize, reasoning=reasoning))
        row = answers.prepare(Row("", tuple(messages), "these messages", tools=tuple(tools)))
        text = answers.renderer.render(Request(row.messages, row.tools, generation_prompt=True), row.where)
        return tokenize(tokenizer, [text + block])[0]
    if [message["role"] for message in messages] != ["user"]:
        raise RecipeError("the tokenizer has no chat template, so a prompt must be one user turn")
    ids = tokenize(tokenizer, [messages[0]["content"]])[0]
    return missing_bos(tokenizer, ids) + ids


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], rules: Rules) -> Encoded:
    """Encode rows as examples; raises RecipeError for a row that cannot be learned."""
    if not stop:
        raise RecipeError("the model names no token that stops generation (eos_token_id in its generation config)")
    encoder = _Encoder(tokenizer, stop, rules)
    encoder.answers.renderer.check_values()
    encoded = Encoded()
    for is_text, group in groupby(rows, key=lambda row: row.text is not None):
        alike = list(group)
        if is_text:
            for example in encode_texts(alike, tokenizer, rules.max_length):
                encoded.add(example)
            continue
        for start in range(0, len(alike), _BATCH):
            encoder.encode_safely(alike[start : start + _BATCH], encoded)
    return encoded


@dataclass(frozen=True)
class _Encoder:
    """Encodes rows for one tokenizer by one recipe's rules."""

    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    rules: Rules

    @cached_property
    def answers(self) -> Answers:
        """Finds answers in rendered conversations."""
        stops = [text for text in (self.tokenizer.decode([token]) for token in sorted(self.stop)) if text]
        return Answers(Renderer(self.tokenizer, self.rules.template), tuple(stops), self.rules)

    def encode_safely(self, rows: list[Row], encoded: Encoded) -> None:
        """Encode rows; what the tokenizer raises becomes an error that names the row."""
        try:
            self._encode(rows, encoded)
        except LlmtuneError:
            raise
        except Exception as error:
            raise self._explain(rows, error) from error

    def _explain(self, rows: list[Row], error: Exception) -> RecipeError:
        """Find the row of a batch on which the tokenizer failed; it may fail in ways of its own."""
        for row in rows:
            try:
                self._encode([row], Encoded())
            except LlmtuneError:
                continue
            except Exception as alone:
                return RecipeError(f"{row.where}: the tokenizer fails on this row: {type(alone).__name__}: {alone}")
        return RecipeError(f"{rows[0].where}: the tokenizer fails on the rows from here on: {error}")

    def _encode(self, rows: list[Row], encoded: Encoded) -> None:
        """Encode rows and add them to what is encoded already."""
        outcomes: list[list[Outcome]] = [[] for _ in rows]
        parts = self._parts(rows)
        while parts:
            following: list[Part] = []
            for part, text, labelled in self._labelled(parts):
                shorter = self._shorter(part, labelled)
                if shorter is None:
                    outcome, rest = self._finish(part, text, labelled)
                    outcomes[part.place].append(outcome)
                    following += rest
                else:
                    following.append(shorter)
            parts = following
        for of_row in outcomes:
            add(of_row[::-1], encoded)

    def _parts(self, rows: list[Row]) -> list[Part]:
        """Return the rows as parts, with what their last answers need rendered in one go."""
        if not self.tokenizer.chat_template:
            return [Part(RowTurns(row, self.answers), place, (1,)) for place, row in enumerate(rows)]
        prepared = [self.answers.prepare(row) for row in rows]
        requests = [request for row in prepared for request in self.answers.requests(row, len(row.messages) - 1)]
        texts = self.answers.renderer.render_all(requests)
        parts = []
        for place, row in enumerate(prepared):
            turns = RowTurns(row, self.answers, texts[2 * place : 2 * place + 2])
            indices = turns.indices if self.rules.learn == "answers" else turns.indices[-1:]
            parts.append(Part(turns, place, tuple(indices)))
        return parts

    def _labelled(self, parts: list[Part]) -> Iterator[tuple[Part, Conversation, Labelled | int]]:
        """Yield each part with its text and labelled ids; the tokens it has at least for one that is far too long."""
        texts = [self._converse(part) for part in parts]
        bounded = [self._bound(part.turns.row, text) for part, text in zip(parts, texts, strict=True)]
        fitting = [text for text in bounded if isinstance(text, Conversation)]
        prompts = iter(tokenize(self.tokenizer, [text.text[: text.prompt] for text in fitting]))
        ends = iter(tokenize(self.tokenizer, [text.text for text in fitting]))
        for part, text, kept in zip(parts, texts, bounded, strict=True):
            if isinstance(kept, int):
                yield part, text, kept
            else:
                where = part.turns.row.where
                yield part, kept, label(kept, next(prompts), next(ends), self.tokenizer, where, self.rules.learn)

    def _converse(self, part: Part) -> Conversation:
        if not self.tokenizer.chat_template:
            return pair(part.turns.row, self.tokenizer, self.stop)
        return part.turns.converse(part.answers)

    def _bound(self, row: Row, text: Conversation) -> Conversation | int:
        """Return a text that may be tokenized, one of megabytes cut, or the tokens that it has at least."""
        if not is_long(text.text, self.rules.max_length):
            return text
        least = least_tokens(text.text, self.rules.max_length, self._ids)
        if least is None:
            return text
        if self.rules.overlength == "error":
            self._refuse(row.where, row.id, least, "at least ")
        cut = cut_start(text, self.rules.max_length, self._ids) if self.rules.overlength == "truncate_prompt" else None
        if cut is None:
            return least
        bos = self.tokenizer.bos_token_id
        return replace(cut, starts_with_bos=bos is not None and self._ids(text.text[:_BEGINNING])[:1] == [bos])

    def _ids(self, text: str) -> list[int]:
        return tokenize(self.tokenizer, [text])[0]

    def _shorter(self, part: Part, labelled: Labelled | int) -> Part | None:
        """Return the start that fits of a row that is to be cut at a turn; None where nothing is to be cut, or fits."""
        size = labelled if isinstance(labelled, int) else len(labelled.ids)
        may_cut = self.rules.overlength == "truncate_turns" and part.is_whole and not part.is_cut
        if size <= self.rules.max_length or not may_cut:
            return None
        answer = last_fitting(part.turns, self.tokenizer, self.rules.max_length)
        if answer is None:
            return None
        return replace(part, answers=(*(index for index in part.answers if index < answer), answer), is_cut=True)

    def _finish(self, part: Part, text: Conversation, labelled: Labelled | int) -> tuple[Outcome, list[Part]]:
        """Return what a part becomes, and the part that the answers become which do not stand in it."""
        standing = {index for index, _ in text.earlier}
        if isinstance(labelled, int):
            return self._outcome(part, text, labelled, None, standing, exactly=False)
        row = part.turns.row
        before, after = self._frame(row, text, labelled.ids)
        ids, labels = before + labelled.ids + after, [IGNORED] * len(before) + labelled.labels + after
        if len(ids) > self.rules.max_length and self.rules.overlength == "error":
            self._refuse(row.where, row.id, len(ids))
        example = Example(row.id, row.where, ids, labels, len(before) + labelled.prompt_size)
        fitting = fit(example, self.tokenizer, self.rules)
        return self._outcome(part, text, len(ids), fitting, {*labelled.answers} if fitting else standing)

    def _outcome(
        self,
        part: Part,
        text: Conversation,
        size: int,
        example: Example | None,
        learned: set[int],
        exactly: bool = True,
    ) -> tuple[Outcome, list[Part]]:
        left = [index for index in part.answers[:-1] if index not in learned]
        alone = [index for index in part.turns.affordable(left) if part.turns.turn(index) is not None]
        outcome = Outcome(part, size, text, example, exactly, len(alone) < len(left))
        return outcome, [replace(part, answers=tuple(alone), is_whole=False)] if alone else []

    def _frame(self, row: Row, text: Conversation, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return what stands before and after the text's ids: BOS where the text lacks it, EOS where no template is."""
        bos = [self.tokenizer.bos_token_id] if text.starts_with_bos and ids[:1] != [self.tokenizer.bos_token_id] else []
        if not self.tokenizer.chat_template:
            return bos or missing_bos(self.tokenizer, ids), [self.tokenizer.eos_token_id]
        if ids[-1] not in self.stop:
            end = self.tokenizer.decode(ids[-1:])
            raise RecipeError(f"{row.where}: the tokenizer reads the stop token at the end of the text as {end!r}")
        return bos, []

    def _refuse(self, where: str, name: str, size: int, least: str = "") -> NoReturn:
        raise RecipeError(
            f"{where}: row {one_line(name, 80)} has {least}{size} tokens, more than data.max_length "
            f"{self.rules.max_length}; try {least and 'more than '}{size}{'' if least else ' or more'}, "
            "or overlength: drop"
        )
