"""A second reader of data files, of few lines, to compare llmtune's with; it says None where it cannot tell."""

import csv
import gzip
import io
import json
from collections.abc import Callable
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
    return [_turns(row) for row in _READERS[file.ending.split(".")[0]](text)]


def _csv(text: str) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    header, *table = csv.reader(io.StringIO(text, newline=""))
    return [_once(list(zip(header, cells, strict=True))) for cells in table if cells]


def _json_lines(text: str) -> list[dict[str, Any]]:
    lines = (line.removeprefix("\ufeff") for line in text.split("\n"))
    return [json.loads(line, object_pairs_hook=_once) for line in lines if line.strip()]


def _json_list(text: str) -> list[dict[str, Any]]:
    value = json.loads(text, object_pairs_hook=_once)
    return list(value["data"] if isinstance(value, dict) else value)


_READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {"csv": _csv, "jsonl": _json_lines, "json": _json_list}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of keys that occur once; raises KeyError, as a second value would hide the first one."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise KeyError("a key occurs twice")
    return mapping


_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "function": "tool", "ipython": "tool"}
_COLUMNS = [("prompt", "completion"), ("instruction", "output")]


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and content of a row's turns; none of a plain text."""
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return [_turn(turn) for turn in row[name]]
    for question, answer in _COLUMNS:
        if question in row and answer in row:
            more = row.get("input") or "" if question == "instruction" else ""
            asked = [text for text in (row[question], more) if text and not text.isspace()]
            return [("user", "\n".join(asked)), ("assistant", row[answer])]
    return [] if isinstance(row["text"], str) else [("", "")]


def _turn(turn: dict[str, Any]) -> tuple[str, str]:
    role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
    if isinstance(content, list) and all(isinstance(part, str) for part in content):
        content = "".join(content)
    return _ROLES.get(role, role), content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
