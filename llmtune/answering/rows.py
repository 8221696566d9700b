"""Rows of a file that are to be answered, with their records: formats of `data`, of which the answer may be missing."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from llmtune.data.formats.base import Record
from llmtune.data.formats.chat import conversation_column
from llmtune.data.formats.columns import pattern_columns, suggest_map
from llmtune.data.formats.registry import recognize
from llmtune.data.formats.turns import OPENAI, SHAREGPT, Keys, is_assistant
from llmtune.data.row import Row
from llmtune.data.rows import Form, Parser
from llmtune.data.sources import Cursor, explained, is_file, problem, records
from llmtune.data.sources.files import reader_of
from llmtune.data.sources.text_files import plain_text
from llmtune.data.sources.unpacking import lines
from llmtune.errors import RecipeError
from llmtune.files import user_path

STAND_IN = "?"
"""Stands where an answer is missing, while a record is parsed."""
_PAIRS = (("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class AskedRow:
    """A row of the file."""

    record: Record
    """What stands in the file."""
    row: Row
    """What was read of it; its last turn is a stand-in where no answer is given."""
    is_answered: bool
    place: str = ""
    """The column in which a missing answer belongs; empty where one is given, or several columns make it."""


@dataclass
class RowsSurvey:
    """What one pass over all rows tells."""

    rows: int = 0
    has_system: bool = False
    has_tools: bool = False
    has_text: bool = False
    digest: str = ""
    """The SHA-256 of all records."""


def survey(source: str, form: Form, written: Collection[str]) -> RowsSurvey:
    """Read all rows once; raises RecipeError at the first bad one, and for one with a column that is to be written."""
    seen, digest = RowsSurvey(), hashlib.sha256()
    for one in read_rows(source, form):
        taken = [name for name in written if name in one.record]
        if taken:
            raise RecipeError(f"{one.row.where}: has a column {taken[0]!r}, into which answers are written; rename it")
        seen.rows += 1
        seen.has_system |= bool(one.row.messages) and one.row.messages[0]["role"] == "system"
        seen.has_tools |= bool(one.row.tools)
        seen.has_text |= one.row.text is not None
        digest.update(line_of(one.record).encode())
    seen.digest = digest.hexdigest()
    return seen


def line_of(record: Record) -> str:
    """Return a record as a line of JSON; what JSON does not know becomes text."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a character in a column that nothing uses
        line = json.dumps(record, default=str)
    return line + "\n"


def read_rows(source: str, form: Form) -> Iterator[AskedRow]:
    """Read the rows of a source; of a .txt, each line is a prompt. Raises RecipeError at the first bad one."""
    at, parser = Cursor(source), Parser(form)
    with explained(at):
        for record in _records(at):
            if not isinstance(record, dict):
                parser.parse(at.where, record)
            whole, is_answered, place = completed(record, form.map)
            yield AskedRow(record, parser.parse(at.where, whole), is_answered, place)


def choose_form(source: str, own: Form) -> Form:
    """Return the form of a source by its first record: the recipe's own, else what its columns say.

    Raises RecipeError for a source that is empty or holds no prompts.
    """
    at = Cursor(source)
    with explained(at):
        record = next(iter(_records(at)), None)
    if record is None:
        raise RecipeError(f"{source}: is empty: it has no rows")
    if not isinstance(record, dict):
        return Form()
    guess = suggest_map({**record, "completion": STAND_IN})
    for form in (own, Form(), *([Form(map=guess)] if guess else [])):
        try:
            Parser(form).parse(at.where, completed(record, form.map)[0])
        except RecipeError:
            continue
        return form
    if recognize(completed(record, {})[0]):
        return Form()  # whose error is to be told
    columns = ", ".join(map(str, record)) or "none"
    raise RecipeError(
        f"{at.where}: holds no prompt: its columns are {columns}; prompt, instruction, messages, conversations or text "
        "is expected"
    )


def completed(record: Record, columns: Mapping[str, str]) -> tuple[Record, bool, str]:
    """Return a record that has an answer, whether it is its own, and the column that a missing one belongs into.

    `columns` are those that fill fields under other names.
    """
    for answer in ("completion", "output", "chosen"):
        if answer in columns:
            return _filled(record, pattern_columns(columns[answer]))
    column = columns.get("messages") or columns.get("conversations") or conversation_column(record)
    if column and _are_turns(record.get(column)):
        return _with_last_turn(record, column)
    for question, answer in _PAIRS:
        if "chosen" not in record and (question in columns or question in record):
            return _filled(record, [answer])
    return record, record.get("text") is None, ""


def with_answer(record: Record, place: str, text: str) -> Record:
    """Return a record with an answer where its format has it; as it is without a place, or for an empty answer."""
    if not place or not text.strip():
        return record
    value = record.get(place)
    if not _are_turns(value):
        return {**record, place: text}
    keys = _keys(value)
    turn = {keys.role: "gpt" if keys is SHAREGPT else "assistant", keys.content: text}
    return {**record, place: [*(value[:-1] if is_assistant(value[-1], keys) else value), turn]}


def _records(at: Cursor) -> Iterator[Any]:
    """Read the records of a source; each line of a .txt with something on it is a prompt."""
    path = user_path(at.source)
    if problem(at.source) or not is_file(at.source) or reader_of(path.name) is not plain_text:
        yield from records(at, "train")
        return
    for line in lines(path, at):
        if line.strip():
            yield {"prompt": line.strip()}


def _filled(record: Record, names: list[str]) -> tuple[Record, bool, str]:
    """Put a stand-in into the columns of an answer that are missing or empty."""
    blank = [name for name in names if _is_blank(record.get(name))]
    filled = {**record, **dict.fromkeys(blank, STAND_IN)}
    return filled, not blank, names[0] if blank and len(names) == 1 else ""


def _with_last_turn(record: Record, column: str) -> tuple[Record, bool, str]:
    """Let a conversation end with an assistant's turn."""
    turns = record[column]
    keys, last = _keys(turns), turns[-1]
    stand_in = {keys.role: "assistant", keys.content: STAND_IN}
    if not is_assistant(last, keys):
        return {**record, column: [*turns, stand_in]}, False, column
    says_nothing = _is_blank(last.get(keys.content)) and not (last.get("tool_calls") or last.get("function_call"))
    if says_nothing:
        return {**record, column: [*turns[:-1], stand_in]}, False, column
    return record, True, ""


def _keys(turns: list[dict[str, Any]]) -> Keys:
    return SHAREGPT if "role" not in turns[0] and "from" in turns[0] else OPENAI


def _are_turns(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _is_blank(value: object) -> bool:
    return value is None or value == [] or (isinstance(value, str) and (not value or value.isspace()))
