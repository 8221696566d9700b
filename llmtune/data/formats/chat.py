"""Conversations: a list of turns with role and content, with tools where there are some."""

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.tools import parse_tools
from llmtune.data.formats.turns import OPENAI, Keys, check_ends, parse_turns
from llmtune.data.formats.values import optional_text
from llmtune.data.row import Tool

COLUMNS = ("messages", "conversations")
_RARE_COLUMNS = ("conversation", "chat", "dialog", "dialogue", "turns")
"""Names that other things have too: they hold a conversation where they hold turns."""
_ALL_COLUMNS = frozenset((*COLUMNS, *_RARE_COLUMNS))


def conversation_column(record: Record) -> str | None:
    """Return the column of a record that holds its conversation."""
    if _ALL_COLUMNS.isdisjoint(record):
        return None
    for name in COLUMNS:
        if name in record:
            return name
    return next((name for name in _RARE_COLUMNS if name in record and _is_turns(record[name])), None)


def conversation(where: str, record: Record, keys: Keys) -> Content:
    """Parse a record with a conversation; a `system` column comes first where no system turn does."""
    column = conversation_column(record) or COLUMNS[0]
    messages, unused = parse_turns(where, column, record.get(column), keys)
    check_ends(where, column, messages)
    used = [column]
    if "system" in record and messages[0]["role"] != "system":
        used.append("system")
        if system := optional_text(where, record, "system"):
            messages = ({"role": "system", "content": system}, *messages)
    tools: tuple[Tool, ...] = ()
    if "tools" in record:
        used.append("tools")
        tools = parse_tools(where, record["tools"])
    return Content(messages, tuple(used), unused, tools)


def is_sharegpt(record: Record) -> bool:
    """Whether a record's conversation has turns with from and value."""
    column = conversation_column(record)
    turns = record[column] if column else None
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "role" not in first and ("from" in first or "value" in first)


def _is_turns(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


CHAT = Format(
    "chat",
    ("messages",),
    ("tools", "system"),
    lambda record: conversation_column(record) is not None and not is_sharegpt(record),
    lambda where, record: conversation(where, record, OPENAI),
)
