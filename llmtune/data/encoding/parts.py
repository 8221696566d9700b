"""The examples that a row becomes: one as a rule, several where the template rewrites earlier turns."""

from dataclasses import dataclass, replace

from llmtune.data.encoding.conversation import Conversation, RowTurns
from llmtune.data.example import Encoded, Example


@dataclass(frozen=True)
class Part:
    """A start of a row, whose last answer becomes an example; other answers that stand in it are learned there too."""

    turns: RowTurns
    place: int
    """The row's place in its batch."""
    answers: tuple[int, ...]
    """The indices of the messages that are left to learn; the part ends with the last."""
    is_whole: bool = True
    """Whether it is the row itself, from which other parts come."""
    is_cut: bool = False
    """Whether turns behind it are left out for max_length."""


@dataclass(frozen=True)
class Outcome:
    """What a part became."""

    part: Part
    size: int
    """Its tokens; at least so many where `exactly` is not set."""
    text: Conversation
    example: Example | None
    exactly: bool = True
    is_partly_learned: bool = False

    @property
    def number(self) -> int:
        """Which of the row's answers it ends with, from 1."""
        return self.part.turns.indices.index(self.part.answers[-1]) + 1


def add(outcomes: list[Outcome], encoded: Encoded) -> None:
    """Add what a row became, in the order of its answers."""
    is_split = len(outcomes) > 1
    row = outcomes[-1].part.turns.row
    kept = []
    for outcome in outcomes:
        name = f"{row.id}#{outcome.number}" if is_split else row.id
        if outcome.example is None:
            encoded.drop(name, outcome.size, outcome.exactly)
            continue
        kept.append(replace(outcome.example, id=name) if is_split else outcome.example)
        encoded.add(kept[-1])
        if len(kept[-1].input_ids) < outcome.size:
            encoded.truncated.append(name)
        encoded.template_adds = encoded.template_adds or outcome.text.adds
        encoded.thinking_block = encoded.thinking_block or outcome.text.block
        encoded.with_block += bool(outcome.text.block)
        encoded.without_block += not outcome.text.block
    if kept and any(outcome.is_partly_learned for outcome in outcomes):
        encoded.partly_learned.append(row.id)
    if kept and outcomes[-1].part.is_cut:
        encoded.cut_at_turn.append(row.id)
    if is_split and kept:
        encoded.split_rows.append(row.id)
        encoded.split_examples += len(kept)
        encoded.split_tokens += sum(len(example.input_ids) for example in kept[:-1])
