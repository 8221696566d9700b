"""A row as rendered text, and where its answers stand in it, in a time that grows with the text's length alone.

An answer is learned where the text has it as generation would produce it: the conversation up to it, rendered alone,
is a start of the text. To render each such start takes the square of the turns, so long conversations are rendered
twice, once with marks in place of the contents. What stands between marks is the template's own text, by which the
contents are found in the real text. A few turns are rendered alone to prove it; where one differs, the last turns are.
"""

import itertools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.template import Turn, last_turn, render, stop_end, turn_at
from llmtune.data.row import Message, Row
from llmtune.errors import RecipeError

RENDERED_ALONE = 8
"""Conversations of at most so many answers are rendered once per answer."""
RENDERED_AT_MOST = 32
"""The last answers that are rendered alone where a long conversation's text says nothing about its starts."""
_MESSAGES_RENDERED = 20_000
"""Messages that are rendered for them at most, which takes about a second."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """A rendered row."""

    text: str
    """The text up to the end of the last answer's stop token."""
    spans: tuple[Span, ...]
    """Starts and ends of the answers that stand in it as generation would produce them, with what the template puts
    before them and their stop tokens; the last answer's is the last."""
    answers: int
    """The answers that the row has."""
    adds: str = ""
    """What the template itself puts before the last answer."""
    starts_with_bos: bool = False
    """Whether the ids start with a BOS token that was cut off the text."""


def converse(row: Row, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> Conversation:
    """Render a row and find its answers; raises RecipeError if the template rejects it or changes the last answer."""
    last = last_turn(row, tokenizer, stops)
    indices = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    earlier = indices[:-1]
    spans = None
    if len(indices) > RENDERED_ALONE:
        spans = _find_spans(row, earlier, last, tokenizer, stops)
    if spans is None:
        alone = _affordable(earlier, row)
        spans = [span for index in alone if (span := _span_alone(row, index, last.end, tokenizer, stops))]
    final = (len(last.prompt), len(last.end))
    return Conversation(last.end, (*spans, final), len(indices), last.adds)


def _affordable(answers: list[int], row: Row) -> list[int]:
    """Return the last answers that may be rendered alone."""
    return answers[-max(1, min(RENDERED_AT_MOST, _MESSAGES_RENDERED // len(row.messages))) :]


def _span_alone(row: Row, index: int, text: str, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> Span | None:
    """Return where the answer of message `index`, rendered as the last turn, stands in a text; None if it does not."""
    try:
        turn = turn_at(row, index, tokenizer, stops)
    except RecipeError:
        return None
    return (len(turn.prompt), len(turn.end)) if turn is not None and text.startswith(turn.end) else None


def _find_spans(
    row: Row, answers: list[int], last: Turn, tokenizer: PreTrainedTokenizerBase, stops: list[str]
) -> list[Span] | None:
    """Return the spans of the answers at these messages; None where they cannot be proved from the whole text."""
    contents = {index: message["content"] for index, message in enumerate(row.messages) if message["content"].strip()}
    pieces = _template_pieces(row, list(contents), last.end, tokenizer)
    places = _place_contents(last.end, pieces, contents) if pieces else None
    if pieces is None or places is None:
        return None
    spans: dict[int, Span | None] = dict.fromkeys(answers)
    leads: dict[str, int | None] = {}
    proofs = {answers[len(answers) * eighths // 8] for eighths in range(0, 8, 2)} | {answers[-1]}
    for index in (index for index in answers if index in places):
        piece, (start, end) = pieces[index], places[index]
        if piece not in leads:  # a new text of the template before an answer: how much of it is no prompt?
            proofs.add(index)
            span = _span_alone(row, index, last.end, tokenizer, stops)
            leads[piece] = span and start - span[0]
        lead, stop = leads[piece], stop_end(last.end, end, stops)
        if lead is not None and stop is not None:
            spans[index] = (start - lead, stop)
    if len(leads) > RENDERED_ALONE:
        return None
    # A template that takes an answer apart may still write it as generation does, with its thought in a block.
    for index in _affordable([index for index in answers if index not in places], row):
        spans[index] = _span_alone(row, index, last.end, tokenizer, stops)
    proved = all(_span_alone(row, index, last.end, tokenizer, stops) == spans[index] for index in sorted(proofs))
    return [span for span in spans.values() if span] if proved else None


def _template_pieces(
    row: Row, indices: list[int], text: str, tokenizer: PreTrainedTokenizerBase
) -> dict[int, str] | None:
    """Return the template's own text before the content of each of these messages; None where it reorders them."""
    unique = next(mark for size in range(1, len(text)) if (mark := f"Mark{'q' * size}") not in text)
    marks = {index: f"{unique}{index}{unique}" for index in indices}
    marked: list[Message] = [
        {**message, "content": marks.get(i, message["content"])} for i, message in enumerate(row.messages)
    ]
    try:
        rest = render(tokenizer, marked, row.where)
    except RecipeError:
        return None
    pieces = {}
    for index, mark in marks.items():
        pieces[index], separator, rest = rest.partition(mark)
        if not separator or unique in pieces[index]:
            return None
    return None if unique in rest else pieces


def _place_contents(text: str, pieces: dict[int, str], contents: dict[int, str]) -> dict[int, Span] | None:
    """Return where contents stand in a text between the template's pieces, without those that the template changed.

    The last content is not looked for. Returns None where the text is not made of these pieces.
    """
    indices = list(contents)
    places: dict[int, Span] = {}
    at = 0
    for index, following in itertools.pairwise(indices):
        if not text.startswith(pieces[index], at):
            return None
        at += len(pieces[index])
        content, piece, other = contents[index], pieces[following], contents[following]
        same = next((form for form in (content, content.strip()) if text.startswith(form + piece, at)), None)
        ends = [text.find(piece + form, at) for form in (other, other.strip())] if same is None else [at + len(same)]
        end = min((end for end in ends if end >= 0), default=None)
        if end is None:
            return None
        if text[at:end].strip() == content.strip():
            places[index] = (at, at + len(text[at:end].rstrip()))
        at = end
    return places
