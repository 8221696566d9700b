"""Encodes rows as token ids and labels with the model's chat template; only answers and stop tokens are learned.

A turn's *prompt* is the text from which generation starts: the rendered turns before it and the generation prompt.
Its *end* is the text up to its stop token. Each is tokenized alone, and the ids of both start the example's ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import token_positions, tokenize
from llmtune.data.encoding.conversation import Conversation, converse
from llmtune.data.encoding.lengths import cut_start, is_long, least_tokens
from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.template import render
from llmtune.data.example import IGNORED, Encoded, Example
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import LlmtuneError, RecipeError, one_line

__all__ = ["IGNORED", "Encoded", "Example", "encode", "prompt_ids"]

_BATCH = 256
"""Rows that are tokenized in one call."""
_BEGINNING = 1000
"""Characters by which a long text is asked whether it starts with BOS."""


def prompt_ids(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Tool] = (),
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids from which generation after `messages` starts; `template` holds the template's values."""
    if tokenizer.chat_template:
        return tokenize(tokenizer, [render(tokenizer, messages, "these messages", True, tools, template)])[0]
    if [message["role"] for message in messages] != ["user"]:
        raise RecipeError("the tokenizer has no chat template, so a prompt must be one user turn")
    ids = tokenize(tokenizer, [messages[0]["content"]])[0]
    return _missing_bos(tokenizer, ids) + ids


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], rules: Rules) -> Encoded:
    """Encode rows as examples; raises RecipeError for a row that cannot be learned."""
    if not stop:
        raise RecipeError("the model names no token that stops generation (eos_token_id in its generation config)")
    encoder = _Encoder(tokenizer, stop, rules.max_length, rules.overlength)
    encoded = Encoded()
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        try:
            encoder.encode(batch, encoded)
        except LlmtuneError:
            raise
        except Exception as error:
            raise _explain(encoder, batch, error) from error
    return encoded


def _explain(encoder: "_Encoder", rows: list[Row], error: Exception) -> RecipeError:
    """Find the row of a batch on which the tokenizer failed; it may fail in ways of its own."""
    for row in rows:
        try:
            encoder.encode([row], Encoded())
        except LlmtuneError:
            continue
        except Exception as alone:
            return RecipeError(f"{row.where}: the tokenizer fails on this row: {type(alone).__name__}: {alone}")
    return RecipeError(f"{rows[0].where}: the tokenizer fails on the rows from here on: {error}")


@dataclass(frozen=True)
class _Encoder:
    """Encodes rows for one tokenizer and one length."""

    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    max_length: int
    overlength: str

    def encode(self, rows: list[Row], encoded: Encoded) -> None:
        """Encode rows and add them to what is encoded already."""
        converse = self._converse if self.tokenizer.chat_template else self._pair
        texts = [self._bound(row, converse(row)) for row in rows]
        fitting = [text for text in texts if isinstance(text, Conversation)]
        prompts = iter(tokenize(self.tokenizer, [text.text[: text.spans[-1][0]] for text in fitting]))
        ends = iter(tokenize(self.tokenizer, [text.text for text in fitting]))
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, int):
                encoded.drop(row.id, text, exactly=False)
                continue
            example, learned = self._example(row, text, next(prompts), next(ends))
            self._add(example, encoded, partly=learned < text.answers)
            encoded.template_adds = encoded.template_adds or text.adds

    def _converse(self, row: Row) -> Conversation:
        return converse(row, self.tokenizer, self._stops)

    @cached_property
    def _stops(self) -> list[str]:
        """The texts of the stop tokens."""
        return [text for text in (self.tokenizer.decode([token]) for token in sorted(self.stop)) if text]

    def _pair(self, row: Row) -> Conversation:
        """Return prompt and completion as one text, for a tokenizer without a chat template."""
        eos = self.tokenizer.eos_token_id
        if eos not in self.stop:
            stops = " or ".join(repr(self.tokenizer.decode([token])) for token in sorted(self.stop))
            raise RecipeError(
                f"the tokenizer ends a text with {self.tokenizer.eos_token!r}, but the model stops at {stops}: "
                "the tuned model would not stop"
            )
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            raise RecipeError(
                f"{row.where}: the tokenizer has no chat template, so a row must be one prompt and one completion; "
                "use an instruct model for conversations"
            )
        prompt = row.messages[0]["content"]
        return Conversation(prompt + row.answer, ((len(prompt), len(prompt) + len(row.answer)),), 1)

    def _bound(self, row: Row, text: Conversation) -> Conversation | int:
        """Return a text that may be tokenized, one of megabytes cut, or the tokens that it has at least."""
        if not is_long(text.text, self.max_length):
            return text
        least = least_tokens(text.text, self.max_length, self._ids)
        if least is None:
            return text
        if self.overlength == "error":
            self._refuse(row.where, row.id, least, "at least ")
        cut = cut_start(text, self.max_length, self._ids) if self.overlength == "truncate_prompt" else None
        if cut is None:
            return least
        bos = self.tokenizer.bos_token_id
        return replace(cut, starts_with_bos=bos is not None and self._ids(text.text[:_BEGINNING])[:1] == [bos])

    def _ids(self, text: str) -> list[int]:
        return tokenize(self.tokenizer, [text])[0]

    def _example(self, row: Row, text: Conversation, prompt: list[int], ids: list[int]) -> tuple[Example, int]:
        """Return the example that starts with the last turn's prompt ids, and the number of answers that it learns."""
        if ids[: len(prompt)] != prompt:
            ids = prompt + _encode_answer(row, text, ids, prompt, self.tokenizer)
        before, after = self._frame(row, text, ids)
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        learned = 1
        if len(text.spans) > 1:
            spans = text.spans[:-1]
            question = text.text[: text.spans[-1][0]]
            positions = token_positions(question, prompt, [place for span in spans for place in span], self.tokenizer)
            for start, end in ((positions.get(start), positions.get(end)) for start, end in spans):
                if start is not None and end is not None:
                    labels[start:end] = ids[start:end]
                    learned += 1
        labels = [IGNORED] * len(before) + labels + after
        return Example(row.id, row.where, before + ids + after, labels, len(before) + len(prompt)), learned

    def _frame(self, row: Row, text: Conversation, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return what stands before and after the text's ids: BOS where the text lacks it, EOS where no template is."""
        bos = [self.tokenizer.bos_token_id] if text.starts_with_bos and ids[:1] != [self.tokenizer.bos_token_id] else []
        if not self.tokenizer.chat_template:
            return bos or _missing_bos(self.tokenizer, ids), [self.tokenizer.eos_token_id]
        if ids[-1] not in self.stop:
            end = self.tokenizer.decode(ids[-1:])
            raise RecipeError(f"{row.where}: the tokenizer reads the stop token at the end of the text as {end!r}")
        return bos, []

    def _add(self, example: Example, encoded: Encoded, partly: bool) -> None:
        """Add an example, cut or left out by the rule for rows over `max_length` tokens."""
        size = len(example.input_ids)
        if size > self.max_length and self.overlength == "error":
            self._refuse(example.where, example.id, size)
        fit = _fit(example, self.tokenizer, self.max_length, self.overlength)
        if fit is None:
            encoded.drop(example.id, size)
            return
        encoded.examples.append(fit)
        if fit is not example:
            encoded.truncated.append(example.id)
        if partly:
            encoded.partly_learned.append(example.id)

    def _refuse(self, where: str, name: str, size: int, least: str = "") -> NoReturn:
        raise RecipeError(
            f"{where}: row {one_line(name, 80)} has {least}{size} tokens, more than data.max_length {self.max_length}; "
            f"try {least and 'more than '}{size}{'' if least else ' or more'}, or overlength: drop"
        )


def _encode_answer(
    row: Row, text: Conversation, ids: list[int], prompt: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of answer and stop token where one token would span the end of the prompt and their start."""
    answer = text.text[text.spans[-1][0] :]
    # Some tokenizers add a space before the first word of a text: behind a line break they do not.
    for guard in ("", "\n"):
        before, guarded = tokenize(tokenizer, [guard, guard + answer])
        rest = guarded[len(before) :]
        if guarded[: len(before)] == before and tokenizer.decode(prompt + rest) == tokenizer.decode(ids):
            return rest
    raise RecipeError(
        f"{row.where}: the tokenizer joins the end of the prompt and the start of the answer ({answer[:20]!r}); "
        "remove white space at the end of the prompt"
    )


def _missing_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return [BOS] if the tokenizer puts one before texts and these ids do not start with it, else []."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if adds and ids[:1] != [bos] else []


def _fit(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, overlength: str) -> Example | None:
    """Apply the rule for rows over `max_length` tokens; returns None where the example is dropped."""
    size = len(example.input_ids)
    if size <= max_length:
        return example
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    kept = int(example.input_ids[0] == tokenizer.bos_token_id)
    cut = size - max_length
    # At least one token of the prompt stays: without any, the answer would have no question.
    if overlength == "drop" or kept + cut >= first:
        return None
    ids, labels = (values[:kept] + values[kept + cut :] for values in (example.input_ids, example.labels))
    return Example(example.id, example.where, ids, labels, example.prompt_size - cut)
