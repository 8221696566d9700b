"""A second reader of data files, of few lines, to compare llmtune's with; it says None where it cannot tell."""

import csv
import gzip
import io
import json
from typing import Any

from tests.fuzz.file_cases import DataFile

Turns = list[list[tuple[str, str]]]
"""Role and content of every turn, row by row."""


def read_turns(file: DataFile) -> Turns | None:
    """Read the turns of every row of a file; None for a Parquet file, raises where the file is no good."""
    if file.ending == "parquet":
        return None
    content = gzip.decompress(file.content) if file.ending.endswith(".gz") else file.content
    text = content.decode("utf-8-sig")
    return [_turns(row) for row in (_csv(text) if file.ending == "csv" else _json_lines(text))]


def _csv(text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    header, *table = csv.reader(io.StringIO(text, newline=""))
    return [_once(list(zip(header, cells, strict=True))) for cells in table if cells]


def _json_lines(text: str) -> list[dict[str, Any]]:
    lines = (line.removeprefix("\ufeff") for line in text.split("\n"))
    return [json.loads(line, object_pairs_hook=_once) for line in lines if line.strip()]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of keys that occur once; raises KeyError, as a second value would hide the first one."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise KeyError("a key occurs twice")
    return mapping


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    if "messages" in row:
        return [(turn["role"], turn["content"]) for turn in row["messages"]]
    return [("user", row["prompt"]), ("assistant", row["completion"])]
