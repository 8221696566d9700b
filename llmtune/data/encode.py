"""Rows -> token ids and labels: the model's own chat template, loss on the assistant's words and the stop token only.

A turn's *prompt* is what generation starts from: the template over the turns before it, with the generation prompt.
Its *end* is the end of its stop token. Both are tokenised as they stand; both are prefixes of the example's ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.rows import Message, Row
from llmtune.data.template import Turn, render, turns
from llmtune.errors import RecipeError

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One encoded row: `labels` are -100 where nothing is learned; the last token is a stop token, and learned."""

    id: str
    where: str
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Encoded:
    """What became of the rows; lists of row ids where not said otherwise."""

    examples: list[Example]
    dropped: list[str]
    """Longer than max_length, and left out."""
    dropped_lengths: list[int]
    """Their lengths in tokens."""
    truncated: list[str]
    """The start of their prompt was cut."""
    partly_learned: list[str]
    """Not all of the assistant's turns are learned (the last one is): the template rewrites the others."""
    template_adds: str
    """What the template puts between the generation prompt and an answer; it is learned with the answer."""


def prompt_ids(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that generation starts from after `messages`."""
    if tokenizer.chat_template:
        return _tokenize(tokenizer, [render(tokenizer, messages, "these messages", True)])[0]
    if [message["role"] for message in messages] != ["user"]:
        raise RecipeError("the tokenizer has no chat template, so a prompt is one user turn")
    ids = _tokenize(tokenizer, [messages[0]["content"]])[0]
    return _leading(tokenizer, ids) + ids


def encode(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], max_length: int, overlength: str
) -> Encoded:
    """The rows as examples of at most `max_length` tokens; raises RecipeError for a row that cannot be right."""
    if not stop:
        raise RecipeError("the model names no token that stops generation (eos_token_id in its generation config)")
    build = _chat if tokenizer.chat_template else _plain
    whole, partly_learned, adds = build(rows, tokenizer, stop)
    fits = [_fit(example, tokenizer, max_length, overlength) for example in whole]
    pairs = list(zip(whole, fits, strict=True))
    return Encoded(
        examples=[fit for fit in fits if fit is not None],
        dropped=[example.id for example, fit in pairs if fit is None],
        dropped_lengths=[len(example.input_ids) for example, fit in pairs if fit is None],
        truncated=[example.id for example, fit in pairs if fit is not None and fit is not example],
        partly_learned=partly_learned,
        template_adds=adds,
    )


def _chat(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> tuple[list[Example], list[str], str]:
    """Examples by the chat template, ids of the partly learned rows, and what the template adds before answers."""
    stops = [text for text in (tokenizer.decode([token]) for token in sorted(stop)) if text]
    by_row = [turns(row, tokenizer, stops) for row in rows]
    prompts = iter(_tokenize(tokenizer, (turn.prompt for found in by_row for turn in found)))
    ends = iter(_tokenize(tokenizer, (turn.end for found in by_row for turn in found)))
    examples, partly = [], []
    for row, found in zip(rows, by_row, strict=True):
        spans = [(next(prompts), next(ends)) for _ in found]
        example, learned = _assemble(row, found[-1], spans, tokenizer, stop)
        examples.append(example)
        if learned < sum(message["role"] == "assistant" for message in row.messages):
            partly.append(row.id)
    return examples, partly, next((found[-1].adds for found in by_row if found[-1].adds), "")


def _assemble(
    row: Row, turn: Turn, spans: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase, stop: set[int]
) -> tuple[Example, int]:
    """The example that starts with the last turn's prompt ids, and how many turns it learns."""
    prompt, ids = spans[-1]
    if ids[: len(prompt)] != prompt:
        ids = prompt + _apart(row, turn, ids, prompt, tokenizer)
    if ids[-1] not in stop:
        raise RecipeError(
            f"{row.where}: the stop token in the chat template's text is read as {tokenizer.decode(ids[-1:])!r}"
        )
    labels = [IGNORED] * len(ids)
    learned = 0
    # A template may rewrite a turn once it is not the last one (Qwen3 leaves its thoughts out): that turn is no prefix.
    for start, end in (*spans[:-1], (prompt, ids)):
        if ids[: len(start)] == start and ids[: len(end)] == end:
            labels[len(start) : len(end)] = ids[len(start) : len(end)]
            learned += 1
    return Example(row.id, row.where, ids, labels), learned


def _apart(row: Row, turn: Turn, whole: list[int], prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of answer and stop token where a token would straddle their border with the prompt."""
    answer = turn.end[len(turn.prompt) :]
    # Some tokenizers put a space before the first word of a text: a line break before it takes the place of that.
    for guard in ("", "\n"):
        before = _tokenize(tokenizer, [guard])[0]
        ids = _tokenize(tokenizer, [guard + answer])[0]
        rest = ids[len(before) :]
        if ids[: len(before)] == before and tokenizer.decode(prompt + rest) == tokenizer.decode(whole):
            return rest
    raise RecipeError(
        f"{row.where}: the tokenizer joins the end of the prompt and the start of the answer ({answer[:20]!r}); "
        "take white space off the end of the prompt"
    )


def _plain(rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> tuple[list[Example], list[str], str]:
    """Examples of a tokenizer without chat template: prompt, completion, end-of-text token."""
    eos = tokenizer.eos_token_id
    if eos not in stop:
        raise RecipeError(
            f"the tokenizer ends a text with {tokenizer.eos_token!r}, but the model stops at "
            f"{' or '.join(repr(tokenizer.decode([token])) for token in sorted(stop))}: it would never learn to stop"
        )
    for row in rows:
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            raise RecipeError(
                f"{row.where}: the tokenizer has no chat template, so a row is one prompt and one completion; "
                "take an instruct model for conversations"
            )
    pairs = [Turn(row.messages[0]["content"], row.messages[0]["content"] + row.answer) for row in rows]
    prompts = _tokenize(tokenizer, (turn.prompt for turn in pairs))
    wholes = _tokenize(tokenizer, (turn.end for turn in pairs))
    examples = []
    for row, turn, prompt, whole in zip(rows, pairs, prompts, wholes, strict=True):
        rest = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _apart(row, turn, whole, prompt, tokenizer)
        start = _leading(tokenizer, prompt) + prompt
        examples.append(Example(row.id, row.where, [*start, *rest, eos], [IGNORED] * len(start) + [*rest, eos]))
    return examples, [], ""


def _leading(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The BOS token where the tokenizer puts one before a text that does not start with it."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if adds and ids[:1] != [bos] else []


def _fit(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, overlength: str) -> Example | None:
    """The example in at most `max_length` tokens by the rule for longer ones, None where it is dropped."""
    size = len(example.input_ids)
    if size <= max_length:
        return example
    if overlength == "error":
        raise RecipeError(
            f"{example.where}: row {example.id} has {size} tokens, more than data.max_length {max_length}; "
            f"give {size} or more, or overlength: drop"
        )
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    kept = int(example.input_ids[0] == tokenizer.bos_token_id)
    cut = size - max_length
    # One token of the prompt stays: an answer to nothing teaches nothing.
    if overlength == "drop" or kept + cut >= first:
        return None
    ids, labels = (values[:kept] + values[kept + cut :] for values in (example.input_ids, example.labels))
    return Example(example.id, example.where, ids, labels)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, special tokens read as such and none added."""
    listed = list(texts)
    if not listed:
        return []
    encoded = tokenizer(listed, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
