"""Encodes rows as token ids and labels with the model's chat template; only answers and stop tokens are learned.

A turn's *prompt* is the text from which generation starts: the rendered turns before it and the generation prompt.
Its *end* is the text up to its stop token. Each is tokenized alone, and the ids of both start the example's ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.rows import Message, Row
from llmtune.data.template import Turn, find_turns, render
from llmtune.errors import RecipeError

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One encoded row; labels are -100 where nothing is learned, and the last token is a learned stop token."""

    id: str
    where: str
    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """The number of learned tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Encoded:
    """The encoded rows, and the ids of rows that were dropped, cut or partly learned."""

    examples: list[Example]
    dropped: list[str]
    """Ids of rows that were longer than max_length and left out."""
    dropped_lengths: list[int]
    """The lengths of the dropped rows in tokens."""
    truncated: list[str]
    """Ids of rows whose prompt was cut at its start."""
    partly_learned: list[str]
    """Ids of rows where only some answers are learned (the last one is), since the template rewrites the others."""
    template_adds: str
    """The text that the template puts before an answer; it is learned with the answer."""


def prompt_ids(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids from which generation after `messages` starts."""
    if tokenizer.chat_template:
        return _tokenize(tokenizer, [render(tokenizer, messages, "these messages", True)])[0]
    if [message["role"] for message in messages] != ["user"]:
        raise RecipeError("the tokenizer has no chat template, so a prompt must be one user turn")
    ids = _tokenize(tokenizer, [messages[0]["content"]])[0]
    return _missing_bos(tokenizer, ids) + ids


def encode(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int], max_length: int, overlength: str
) -> Encoded:
    """Encode rows as examples of at most `max_length` tokens; raises RecipeError for a row that cannot be learned."""
    if not stop:
        raise RecipeError("the model names no token that stops generation (eos_token_id in its generation config)")
    encode_all = _encode_chats if tokenizer.chat_template else _encode_pairs
    examples, partly_learned, adds = encode_all(rows, tokenizer, stop)
    fits = [_fit(example, tokenizer, max_length, overlength) for example in examples]
    pairs = list(zip(examples, fits, strict=True))
    return Encoded(
        examples=[fit for fit in fits if fit is not None],
        dropped=[example.id for example, fit in pairs if fit is None],
        dropped_lengths=[len(example.input_ids) for example, fit in pairs if fit is None],
        truncated=[example.id for example, fit in pairs if fit is not None and fit is not example],
        partly_learned=partly_learned,
        template_adds=adds,
    )


def _encode_chats(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int]
) -> tuple[list[Example], list[str], str]:
    """Return examples by the chat template, ids of partly learned rows, and what the template adds before answers."""
    stops = [text for text in (tokenizer.decode([token]) for token in sorted(stop)) if text]
    by_row = [find_turns(row, tokenizer, stops) for row in rows]
    prompts = iter(_tokenize(tokenizer, (turn.prompt for turns in by_row for turn in turns)))
    ends = iter(_tokenize(tokenizer, (turn.end for turns in by_row for turn in turns)))
    examples, partly = [], []
    for row, turns in zip(rows, by_row, strict=True):
        spans = [(next(prompts), next(ends)) for _ in turns]
        example, learned = _assemble(row, turns[-1], spans, tokenizer, stop)
        examples.append(example)
        if learned < sum(message["role"] == "assistant" for message in row.messages):
            partly.append(row.id)
    return examples, partly, next((turns[-1].adds for turns in by_row if turns[-1].adds), "")


def _assemble(
    row: Row, turn: Turn, spans: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase, stop: set[int]
) -> tuple[Example, int]:
    """Return the example that starts with the last turn's prompt ids, and the number of turns that it learns."""
    prompt, ids = spans[-1]
    if ids[: len(prompt)] != prompt:
        ids = prompt + _encode_answer(row, turn, ids, prompt, tokenizer)
    if ids[-1] not in stop:
        raise RecipeError(
            f"{row.where}: the tokenizer reads the stop token at the end of the text as {tokenizer.decode(ids[-1:])!r}"
        )
    labels = [IGNORED] * len(ids)
    learned = 0
    # A template may rewrite a turn that is no longer the last (Qwen3 removes its thoughts): it is not learned then.
    for start, end in (*spans[:-1], (prompt, ids)):
        if ids[: len(start)] == start and ids[: len(end)] == end:
            labels[len(start) : len(end)] = ids[len(start) : len(end)]
            learned += 1
    return Example(row.id, row.where, ids, labels), learned


def _encode_answer(
    row: Row, turn: Turn, ids: list[int], prompt: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of answer and stop token where one token would span the end of the prompt and their start."""
    answer = turn.end[len(turn.prompt) :]
    # Some tokenizers add a space before the first word of a text: behind a line break they do not.
    for guard in ("", "\n"):
        before = _tokenize(tokenizer, [guard])[0]
        guarded = _tokenize(tokenizer, [guard + answer])[0]
        rest = guarded[len(before) :]
        if guarded[: len(before)] == before and tokenizer.decode(prompt + rest) == tokenizer.decode(ids):
            return rest
    raise RecipeError(
        f"{row.where}: the tokenizer joins the end of the prompt and the start of the answer ({answer[:20]!r}); "
        "remove white space at the end of the prompt"
    )


def _encode_pairs(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, stop: set[int]
) -> tuple[list[Example], list[str], str]:
    """Return examples for a tokenizer without chat template: prompt, completion, end-of-text token."""
    eos = tokenizer.eos_token_id
    if eos not in stop:
        raise RecipeError(
            f"the tokenizer ends a text with {tokenizer.eos_token!r}, but the model stops at "
            f"{' or '.join(repr(tokenizer.decode([token])) for token in sorted(stop))}: the tuned model would not stop"
        )
    for row in rows:
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            raise RecipeError(
                f"{row.where}: the tokenizer has no chat template, so a row must be one prompt and one completion; "
                "use an instruct model for conversations"
            )
    pairs = [Turn(row.messages[0]["content"], row.messages[0]["content"] + row.answer) for row in rows]
    prompts = _tokenize(tokenizer, (turn.prompt for turn in pairs))
    full = _tokenize(tokenizer, (turn.end for turn in pairs))
    examples = []
    for row, turn, prompt, ids in zip(rows, pairs, prompts, full, strict=True):
        rest = ids[len(prompt) :] if ids[: len(prompt)] == prompt else _encode_answer(row, turn, ids, prompt, tokenizer)
        start = _missing_bos(tokenizer, prompt) + prompt
        examples.append(Example(row.id, row.where, [*start, *rest, eos], [IGNORED] * len(start) + [*rest, eos]))
    return examples, [], ""


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
    if overlength == "error":
        raise RecipeError(
            f"{example.where}: row {example.id} has {size} tokens, more than data.max_length {max_length}; "
            f"try {size} or more, or overlength: drop"
        )
    first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
    kept = int(example.input_ids[0] == tokenizer.bos_token_id)
    cut = size - max_length
    # At least one token of the prompt stays: without any, the answer would have no question.
    if overlength == "drop" or kept + cut >= first:
        return None
    ids, labels = (values[:kept] + values[kept + cut :] for values in (example.input_ids, example.labels))
    return Example(example.id, example.where, ids, labels)


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Tokenize each text; special tokens in it count as such, and none are added."""
    batch = list(texts)
    if not batch:
        return []
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
