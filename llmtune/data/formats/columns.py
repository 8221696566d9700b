"""Columns under other names: what data.map makes of a record, and what to write into it."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llmtune.data.formats.base import Format, Record
from llmtune.data.formats.registry import FORMATS, NAMES, with_fields
from llmtune.data.formats.values import describe
from llmtune.errors import FieldError, nearest

FIELDS = tuple(dict.fromkeys(name for format in FORMATS for name in format.fields))
"""Every field that data.map may fill."""
_BRACES = re.compile(r"\{([^{}]*)\}")

# Other names of these fields, in three ranks: a later one counts only where there is none of an earlier one.
_QUESTIONS = (
    ("prompt", "instruction", "question", "query", "user", "problem"),
    ("text", "document", "article", "source", "sentence", "title"),
)
_BESIDE_QUESTIONS = ("context", "input")
"""What stands beside a question, and belongs to it; a question where there is no other."""
_ANSWERS = (
    ("completion", "output", "response", "answer", "assistant", "solution"),
    ("target", "label", "summary", "chosen", "answers", "highlights"),
)
_MEANINGS = {"prompt": "question", "instruction": "question", "completion": "answer", "output": "answer"}


@dataclass(frozen=True)
class ColumnMap:
    """What data.map says: which columns fill which fields."""

    columns: Mapping[str, str]

    def check(self, format: str) -> None:
        """Raise FieldError for a field that the format, or any, does not have, and for fields of several formats."""
        known = NAMES[format].fields if format in NAMES else FIELDS
        for name in self.columns:
            if name not in known:
                of = f"of data.format {format}" if format in NAMES else "of rows"
                message = f"is no field {of}: {', '.join(known)}{nearest(name, list(known))}"
                raise FieldError(f"data.map.{name}", message)
        if not with_fields(self.columns):
            raise FieldError("data.map", f"no format has the fields {' and '.join(self.columns)} together")

    def apply(self, where: str, record: Record) -> Record:
        """Return a record with its fields filled; the columns that filled them are gone.

        Raises FieldError for a column that is not there, and for one that cannot be joined.
        """
        filled: Record = {}
        taken: set[str] = set()
        for field, column in self.columns.items():
            if column in record:
                filled[field], names = record[column], {column}
            else:
                filled[field], names = self._join(where, record, field, column)
            taken |= names
        return {name: value for name, value in record.items() if name not in taken and name not in filled} | filled

    def misses(self, record: Record) -> bool:
        """Whether a record has none of the columns that the map names."""
        return not any(
            name in record for column in self.columns.values() for name in (column, *_BRACES.findall(column))
        )

    def _join(self, where: str, record: Record, field: str, pattern: str) -> tuple[str, set[str]]:
        """Return a pattern with the text of columns in place of their names in braces, without white space around."""
        names = set(_BRACES.findall(pattern))
        for name in names or {pattern}:
            if name not in record:
                columns = [str(column) for column in record]
                message = f"{where}: there is no column {name!r} ({', '.join(columns)}){nearest(name, columns)}"
                raise FieldError(f"data.map.{field}", message)
        text = _BRACES.sub(lambda match: self._text(where, field, match[1], record[match[1]]), pattern)
        return text.strip(), names

    def _text(self, where: str, field: str, column: str, value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise FieldError(f"data.map.{field}", f"{where}: column {column!r} is {describe(value)}; text is expected")


def pattern_columns(pattern: str) -> list[str]:
    """The columns that a value of data.map names: those in its braces, or the one that it is."""
    return list(dict.fromkeys(_BRACES.findall(pattern))) or [pattern]


def suggest_map(columns: Collection[str], fields: tuple[str, str] = ("prompt", "completion")) -> dict[str, str]:
    """Return the map that makes a question and an answer of columns with other usual names; {} if they do not tell."""
    there = [str(column) for column in columns]
    answer = _alike(there, _ANSWERS, fields[1])
    questions = _alike([name for name in there if name not in answer], _QUESTIONS, fields[0])
    beside = [name for name in there if name.lower() in _BESIDE_QUESTIONS and name not in (*answer, *questions)]
    question = sorted({*questions[:1], *beside}, key=there.index)
    if not question or not answer:
        return {}
    joined = question[0] if len(question) == 1 else "\n".join(f"{{{name}}}" for name in question)
    return {name: value for name, value in zip(fields, (joined, answer[0]), strict=True) if name != value}


def write_map(columns: Mapping[str, str]) -> str:
    """Write a map as YAML in one line."""
    return f"{{{', '.join(f'{name}: {_quote(value)}' for name, value in columns.items())}}}"


def hint(record: Mapping[str, Any]) -> str:
    """Name the columns of a record that fits no format, and say what to do."""
    columns = [str(column) for column in record]
    names = f"columns {', '.join(columns)}" if columns else "no columns"
    if "text" in columns and suggest_map(columns):
        return f"{names}: write data.map: {write_map(suggest_map(columns))}, or data.format: text to learn text alone"
    return f"{names}: {_advice(columns)}"


def named_hint(format: Format, record: Mapping[str, Any], missing: list[str]) -> str:
    """Say what a record lacks to be of the format that the recipe names."""
    columns = [str(column) for column in record]
    advice = suggest_map(columns, (format.needed[0], format.needed[1])) if format.name in _PAIRS else {}
    if not advice:
        advice = dict(_typos(columns, missing))
    write = f": write data.map: {write_map(advice)}" if advice else ""
    fits = next((other.name for other in FORMATS if other.fits(dict(record))), None)
    instead = f"; they are {fits}" if fits else ""
    return f"has no {' and no '.join(missing)}; its columns are {', '.join(columns)}{instead}{write}"


_PAIRS = ("prompt_completion", "alpaca")


def _advice(columns: list[str]) -> str:
    """Say what to write for columns that fit no format."""
    suggestion = suggest_map(columns) or dict(_typos(columns, ["messages", "conversations", "text"]))
    if suggestion:
        return f"write data.map: {write_map(suggestion)}"
    halves = [("prompt", "completion"), ("completion", "prompt"), ("instruction", "output"), ("output", "instruction")]
    for there, absent in (*halves, ("chosen", "rejected"), ("rejected", "chosen")):
        if there in columns:
            return f"{absent} is missing"
    needed = [" and ".join(format.needed) for format in FORMATS]
    return f"{', or '.join(needed)} are expected; data.map names columns"


def _alike(columns: list[str], ranks: tuple[tuple[str, ...], ...], field: str) -> list[str]:
    """Return the columns that are other names of a field, the best rank's, else the one that looks like a typo."""
    if field in columns:
        return [field]
    lower = {column.lower(): column for column in columns}
    for rank in ranks:
        names = [lower[word] for word in rank if word in lower]
        if names:
            return names
    beside = [lower[word] for word in _BESIDE_QUESTIONS if word in lower and _MEANINGS.get(field) == "question"]
    close = get_close_matches(field, list(lower), n=1, cutoff=0.75)
    return [lower[word] for word in close] or beside


def _typos(columns: list[str], fields: list[str]) -> Iterator[tuple[str, str]]:
    """Yield fields with the columns that look like a typo of them."""
    for field in fields:
        close = get_close_matches(field, [column.lower() for column in columns], n=1, cutoff=0.75)
        yield from ((field, column) for column in columns if [column.lower()] == close and column != field)


def _quote(value: str) -> str:
    return value if re.fullmatch(r"\w[\w -]*\w|\w", value) else json.dumps(value, ensure_ascii=False)
