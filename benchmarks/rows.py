"""The rows of the bench: turns of the sample that ships, joined to conversations of three lengths, always the same."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from llmtune.data.batches.order import order
from llmtune.data.example import Example
from llmtune.files import shipped_folder

TURNS = {"80": (1, 2, 2, 1, 2), "437": (8, 12, 10, 13, 9, 11, 9, 10), "947": (17, 28, 22, 25, 20, 24, 19, 26)}
"""How many rows of the sample follow each other as turns of a row, by the mean tokens that this gives SmolLM2."""
MAX_LENGTH = 2048
"""Tokens of a row at most; no row is longer."""


@cache
def _sample() -> list[list[dict[str, str]]]:
    file = shipped_folder("sample") / "train.jsonl"
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def joined_rows(length: str, count: int) -> list[dict[str, Any]]:
    """So many rows of a mean length, each of the next turns of the sample, which begins anew at its end."""
    sample, rows, start = _sample(), [], 0
    for index in range(count):
        turns = TURNS[length][index % len(TURNS[length])]
        picked = [sample[(start + turn) % len(sample)] for turn in range(turns)]
        start += turns
        messages = [*picked[0], *(message for row in picked[1:] for message in row[1:])]
        rows.append({"id": f"{length}-{index:03d}", "messages": messages})
    return rows


def in_order(examples: Sequence[Example], batch: int, epochs: int) -> list[dict[str, Any]]:
    """The encoded rows of all epochs in the order in which llmtune trains on them, ungrouped, with seed 0."""
    lengths = [len(example.input_ids) for example in examples]
    indices = [row for epoch in range(epochs) for row in order(lengths, batch, 0, epoch, False)]
    return [{"input_ids": list(examples[row].input_ids), "labels": list(examples[row].labels)} for row in indices]
