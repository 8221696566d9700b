"""A row as rendered text, and where its answers stand in it, in a time that grows with the text's length alone.

An answer is learned where the text has it as generation would produce it: the conversation up to it, rendered alone,
is a start of the text. To render each such start takes the square of the turns, so long conversations are rendered
twice, once with marks in place of the contents (`marked.py`). A few turns are rendered alone to prove it; where one
differs, the last turns are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from llmtune.data.encoding.rendering.marked import place_contents, template_pieces, tool_results
from llmtune.data.encoding.rendering.reasoning import split_thought
from llmtune.data.encoding.turns import Answers, Turn
from llmtune.data.row import Row
from llmtune.errors import RecipeError

RENDERED_ALONE = 8
"""Conversations of at most so many answers are rendered once per answer."""
_MESSAGES_RENDERED = 20_000
"""Messages that are rendered at most to render answers alone, which takes about a second."""


class Span(NamedTuple):
    """Where an answer stands in a text."""

    generation: int
    """Where the template's generation prompt ends."""
    learned: int
    """Where the learned text starts; an empty block and reasoning that is context stand before it."""
    end: int
    """The end of its stop token."""


@dataclass(frozen=True)
class Conversation:
    """A rendered row, or a start of it."""

    text: str
    """The text up to the end of the last answer's stop token."""
    prompt: int
    """Where generation of the last answer starts."""
    learned: int
    """Where the learned text of the last answer starts."""
    earlier: tuple[tuple[int, Span], ...] = ()
    """Other answers to learn that stand in it as generation would produce them, by the index of their message."""
    masked: tuple[tuple[int, int], ...] = ()
    """What is not learned before the last answer where all else is."""
    adds: str = ""
    """What the template itself puts before the last answer; it is learned."""
    block: str = ""
    """The empty thinking block that the template puts before the last answer."""
    starts_with_bos: bool = False
    """Whether the ids start with a BOS token that was cut off the text."""

    @property
    def first(self) -> int:
        """Where the first learned answer starts."""
        return min([self.learned, *(span.learned for _, span in self.earlier)])


@dataclass
class RowTurns:
    """The answers of a row, each rendered once as the last turn."""

    row: Row
    answers: Answers
    texts: Sequence[str | None] = (None, None)
    """The rendered prompt and conversation of the last answer, where they are there already."""
    _turns: dict[int, Turn | None] = field(default_factory=dict)

    @cached_property
    def indices(self) -> list[int]:
        """The indices of the assistant's turns."""
        return [index for index, message in enumerate(self.row.messages) if message["role"] == "assistant"]

    @cached_property
    def last(self) -> Turn:
        """The last answer; raises RecipeError that says why the model could not learn it."""
        turn = self._turns[self.indices[-1]] = self.answers.last(self.row, self.texts)
        return turn

    def turn(self, index: int) -> Turn | None:
        """The answer of message `index` as the last turn; None if it cannot be learned."""
        if index == self.indices[-1]:
            return self.last
        if index not in self._turns:
            self._turns[index] = self.answers.at(self.row, index)
        return self._turns[index]

    def affordable(self, indices: Sequence[int]) -> list[int]:
        """Return the last of these answers that may be rendered alone."""
        if len(self.indices) <= RENDERED_ALONE:
            return list(indices)
        among = {*self.indices[-max(1, _MESSAGES_RENDERED // len(self.row.messages)) :]}
        return [index for index in indices if index in among]

    def converse(self, indices: Sequence[int]) -> Conversation:
        """Return the conversation up to the last of these answers, and which of the others stand in it."""
        *earlier, index = indices
        turn = self.turn(index)
        assert turn is not None
        block = turn.end[turn.generation : turn.prompt]
        if self.answers.rules.learn == "all":
            return Conversation(turn.end, turn.prompt, turn.learned, (), self._masked(turn, index), turn.adds, block)
        spans = self._spans(earlier, turn) if index == self.indices[-1] and len(earlier) >= RENDERED_ALONE else None
        if spans is None:
            alone = ((i, self._alone(i, turn.end)) for i in self.affordable(earlier))
            spans = {i: span for i, span in alone if span}
        return Conversation(turn.end, turn.prompt, turn.learned, tuple(spans.items()), (), turn.adds, block)

    def _alone(self, index: int, text: str) -> Span | None:
        """Return where an answer, rendered as the last turn, stands in a text; None if it does not."""
        turn = self.turn(index)
        if turn is None:
            return None
        if text.startswith(turn.end):
            return Span(turn.generation, turn.learned, len(turn.end))
        # Some templates put an empty thinking block before the last answer alone; generation may do without it.
        short = turn.end[: turn.generation] + turn.end[turn.prompt :]
        if turn.prompt > turn.generation and text.startswith(short):
            return Span(turn.generation, turn.generation, len(short))
        return None

    def _masked(self, last: Turn, end: int) -> tuple[tuple[int, int], ...]:
        """Return what is not learned up to answer `end`: tools' results, empty blocks, and reasoning as context."""
        row = replace(self.row, messages=self.row.messages[: end + 1])
        context = self.answers.rules.reasoning == "context"
        indices = [index for index in self.indices if index < end]
        masked = [
            *tool_results(row, last.end[: last.generation], self.answers.renderer),
            (last.generation, last.prompt),
        ]
        thoughts = [i for i in indices if context and split_thought(row.messages[i])[0].strip()]
        blocks = indices if last.prompt > last.generation else []
        needed = sorted({*thoughts, *blocks})
        if self.affordable(needed) != needed:
            raise RecipeError(f"{row.where}: has too many turns for data.learn: all; use data.learn: answers")
        for index in needed:
            span = self._alone(index, last.end)
            if span:
                masked.append((span.generation, span.learned))
            elif index in thoughts and split_thought(row.messages[index])[0].strip() in last.end:
                raise RecipeError(
                    f"{row.where}: the chat template rewrites an earlier answer, so that its reasoning cannot be told "
                    "from what is learned; use data.learn: answers, or data.reasoning: drop"
                )
        return tuple((start, stop) for start, stop in masked if start < stop)

    def _spans(self, indices: list[int], last: Turn) -> dict[int, Span] | None:
        """Return the spans of these answers; None where they cannot be proved from the whole text."""
        row = self.row
        contents = {
            index: message["content"] for index, message in enumerate(row.messages) if message["content"].strip()
        }
        pieces = template_pieces(row, list(contents), last.end, self.answers.renderer)
        places = place_contents(last.end, pieces, contents) if pieces else None
        if pieces is None or places is None:
            return None
        spans: dict[int, Span | None] = dict.fromkeys(indices)
        leads: dict[str, tuple[int, int] | None] = {}
        proofs = {indices[len(indices) * eighths // 8] for eighths in range(0, 8, 2)} | {indices[-1]}
        quick = [index for index in indices if index in places and self._is_plain(index)]
        for index in quick:
            piece, (start, end) = pieces[index], places[index]
            if piece not in leads:  # a new text of the template before an answer: how much of it is no prompt?
                proofs.add(index)
                span = self._alone(index, last.end)
                leads[piece] = span and (start - span.generation, start - span.learned)
            lead, stop = leads[piece], self.answers.stop_end(last.end, end)
            if lead is not None and stop is not None:
                spans[index] = Span(start - lead[0], start - lead[1], stop)
        if len(leads) > RENDERED_ALONE:
            return None
        # A template that takes an answer apart may still write it as generation does, with its thought in a block.
        for index in self.affordable([index for index in indices if index not in quick]):
            spans[index] = self._alone(index, last.end)
        proved = all(self._alone(index, last.end) == spans[index] for index in sorted(proofs))
        return {index: span for index, span in spans.items() if span} if proved else None

    def _is_plain(self, index: int) -> bool:
        """Whether what is learned of an answer is its content and nothing before or behind it."""
        message = self.row.messages[index]
        has_context = self.answers.rules.reasoning == "context" and split_thought(message)[0].strip()
        return not message.get("tool_calls") and not has_context
