"""How long the training rows are: counted where they were tokenized, else estimated from their characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from llmtune.data.encoding.encode import IGNORED, Example
from llmtune.data.row import Row

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
    lengths = [len(example.input_ids) for example in examples]
    learned = sum(label != IGNORED for example in examples for label in example.labels)
    return Lengths(len(lengths), max(lengths), sum(lengths), learned / sum(lengths), counted=True)


def estimated(rows: Sequence[Row], max_length: int) -> Lengths:
    """The lengths that rows have by their characters; longer ones than `max_length` are taken to be cut."""
    texts = [[message["content"] for message in row.messages] for row in rows]
    lengths = [min(max_length, sum(ceil(len(text) / CHARACTERS) + TURN for text in row)) for row in texts]
    answers = sum(ceil(len(row[-1]) / CHARACTERS) for row in texts)
    return Lengths(len(lengths), max(lengths), sum(lengths), min(1.0, answers / sum(lengths)), counted=False)
