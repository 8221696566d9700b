"""Bounds the length of long texts before they are tokenized: a text of megabytes takes many seconds."""

from collections.abc import Callable
from dataclasses import replace

from llmtune.data.encoding.conversation import Conversation, Span

Tokenize = Callable[[str], list[int]]

_CHARACTERS, _CHARACTERS_PER_TOKEN = 100_000, 32
"""Texts up to the first, and up to the second per token of max_length, are tokenized as they are."""
_UNSURE = 64
"""Tokens at the cut end of a text that may differ from the complete text's."""


def is_long(text: str, max_length: int) -> bool:
    """Whether a text is so long that its length is bounded first."""
    return len(text) > max(_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)


def least_tokens(text: str, max_length: int, tokenize: Tokenize) -> int | None:
    """Return a number over `max_length` of tokens that a text has at least; None if it may have fewer.

    Starts of the text are tokenized, each twice as long as the one before.
    """
    size = 8 * max_length
    while size < len(text):
        count = len(tokenize(text[:size])) - _UNSURE
        if count > max_length:
            return count
        size *= 2
    return None


def cut_start(conversation: Conversation, max_length: int, tokenize: Tokenize) -> Conversation | None:
    """Return a conversation without most of its first prompt, and over `max_length` tokens still.

    Its last `max_length` tokens are those of the complete text. None where the first answer would be cut, or where
    tokens depend on text far before them.
    """
    text, first = conversation.text, conversation.first
    if is_long(text[first:], max_length) and least_tokens(text[first:], max_length, tokenize) is not None:
        return None
    size = 8 * max_length
    while size < len(text):
        start = len(text) - size
        if start >= first:
            size *= 2
            continue
        ids = tokenize(text[start:])
        if len(ids) >= max_length + 2 * _UNSURE:
            return _from(conversation, start) if _agrees(text, start, ids, max_length, tokenize) else None
        size *= 2
    return conversation


def _agrees(text: str, start: int, ids: list[int], max_length: int, tokenize: Tokenize) -> bool:
    """Whether the last `max_length` tokens stay the same where the text starts some characters later or earlier."""
    shifts = [shift for shift in (-1, 1, 7, _UNSURE) if 0 <= start + shift < len(text)]
    tails = [tokenize(text[start + shift :])[-max_length:] for shift in shifts]
    return all(tail == ids[-max_length:] for tail in tails)


def _from(conversation: Conversation, start: int) -> Conversation:
    earlier = tuple((index, Span(*(place - start for place in span))) for index, span in conversation.earlier)
    masked = tuple((max(0, begin - start), end - start) for begin, end in conversation.masked if end > start)
    return replace(
        conversation,
        text=conversation.text[start:],
        prompt=conversation.prompt - start,
        learned=conversation.learned - start,
        earlier=earlier,
        masked=masked,
    )
