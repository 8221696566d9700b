"""How long the training rows are: counted where they were tokenized, else estimated from their characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.data.store.encoded import lengths_of, supervised_of

CHARACTERS = 3.5
"""Of a token, about, in English under today's tokenizers; other languages and code have fewer."""
TURN = 6
"""Tokens that a chat template puts around a turn, about."""


@dataclass(frozen=True)
class Lengths:
    """The training rows: how many, tokens of the longest and of all, and the share of tokens that is learned."""

    rows: int
    longest: int
    tokens: int
    supervised: float
    counted: bool
    """Whether rows were tokenized."""

    @property
    def words(self) -> str:
        """Where the numbers come from."""
        longest = f"{self.tokens:,} tokens in the training rows, the longest row has {self.longest:,}"
        return longest if self.counted else f"about {longest}: estimated from characters; llmtune check counts tokens"


def counted(examples: Sequence[Example]) -> Lengths:
    """The lengths of encoded rows."""
    lengths, learned = lengths_of(examples), sum(supervised_of(examples))
    total = sum(lengths)
    return Lengths(len(lengths), max(lengths, default=0), total, learned / max(1, total), counted=True)


def estimated(rows: Sequence[Row], max_length: int) -> Lengths:
    """The lengths that rows have by their characters; longer ones than `max_length` are taken to be cut."""
    lengths, answers = [], 0
    for row in rows:
        texts = [row.text] if row.text is not None else [str(turn.get("content") or "") for turn in row.messages]
        lengths.append(min(max_length, sum(ceil(len(text) / CHARACTERS) + TURN for text in texts)))
        answers += ceil(len(texts[-1]) / CHARACTERS)
    return Lengths(len(lengths), max(lengths), sum(lengths), min(1.0, answers / sum(lengths)), counted=False)
