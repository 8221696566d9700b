"""The rows of the check, made of the sample that ships: long ones of several turns, short ones, and their order."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from llmtune.data.batches.order import order
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.rows import read
from llmtune.files import shipped_folder

MAX_LENGTH = 1024
SHORT = 96
"""The most tokens of a short row."""
_SPOKEN = 32


@cache
def _sample() -> list[list[dict[str, str]]]:
    file = shipped_folder("sample") / "train.jsonl"
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def long_messages(index: int) -> list[dict[str, str]]:
    """The messages of a long row: two to six rows of the sample as turns, some 300 to 1,000 tokens of one byte."""
    sample, turns = _sample(), 2 + index % 5
    picked = [sample[(index * 7 + turn) % len(sample)] for turn in range(turns)]
    return [*picked[0], *(message for row in picked[1:] for message in row[1:])]


def short_messages(index: int) -> list[dict[str, str]]:
    """The messages of a short row: one row of the sample, cut to at most 96 tokens."""
    sample = _sample()
    turns = sample[index % len(sample)][1:3]
    cut = [turn["content"].encode()[: _SPOKEN - index % 12].decode(errors="ignore") for turn in turns]
    return [{"role": turn["role"], "content": text} for turn, text in zip(turns, cut, strict=True)]


def write_rows(file: Path, count: int, kind: str) -> Path:
    """Write so many `long` or `short` rows as JSONL."""
    make = {"long": long_messages, "short": short_messages}[kind]
    file.write_text("".join(json.dumps({"id": f"{kind}-{n}", "messages": make(n)}) + "\n" for n in range(count)))
    return file


def encoded(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a file as input_ids and labels, as llmtune trains on them."""
    examples = encode(read(str(file)), tokenizer, {tokenizer.eos_token_id}, Rules(MAX_LENGTH, "drop")).examples
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def in_order(rows: list[dict[str, Any]], batch: int, epochs: int) -> list[dict[str, Any]]:
    """The rows of all epochs in the order in which llmtune trains on them, ungrouped, with seed 0."""
    lengths = [len(row["input_ids"]) for row in rows]
    return [rows[row] for epoch in range(epochs) for row in order(lengths, batch, 0, epoch, False)]


def count_tokens(rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Tokens, supervised tokens, and the sum of squared lengths, which attention costs."""
    supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
    lengths = [len(row["input_ids"]) for row in rows]
    return sum(lengths), supervised, sum(length**2 for length in lengths)
