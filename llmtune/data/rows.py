"""Rows: chat messages or prompt and completion, read from any source, every one of them checked."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtune.data.sources import records
from llmtune.errors import RecipeError, nearest

Message = dict[str, str]
"""One turn: its role and its content."""

ROLES = ("system", "user", "assistant")

# What people call these columns, the likeliest first.
_SYNONYMS = {
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "prompt": ("instruction", "question", "query", "user", "source", "context", "input", "text"),
    "completion": ("output", "response", "answer", "target", "label", "assistant", "summary", "chosen"),
}
# Chat templates render these: to pass over them would train on something else than the row says.
_RENDERED = ("tool_calls", "function_call", "tools", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Row:
    """One checked row; its last turn is the assistant's."""

    id: str
    messages: tuple[Message, ...]
    where: str
    ignored: tuple[str, ...] = ()
    """Columns that the row has beside the known ones."""

    @property
    def prompt(self) -> list[Message]:
        """The turns before the last one."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]


def read(source: str, default_split: str = "train") -> list[Row]:
    """All rows of a file or Hub data set `owner/name[:split]`, in order; raises RecipeError at the first bad one."""
    rows = [_row(where, record) for where, record in records(source, default_split)]
    if not rows:
        raise RecipeError(f"{source}: is empty: it holds no row")
    return rows


def _row(where: str, record: Any) -> Row:
    """A record as a row; raises RecipeError naming its place and key."""
    if not isinstance(record, dict):
        raise RecipeError(
            f"{where}: holds {_name(record)}; an object with messages, or prompt and completion, is expected"
        )
    _refuse_rendered(where, record)
    if "messages" in record:
        messages, ignored = _messages(where, record["messages"])
        known = {"messages", "id"}
    else:
        messages, ignored = _pair(where, record), set()
        known = {"prompt", "completion", "id"}
    ignored |= {str(column) for column in record if column not in known}
    given = record.get("id")
    return Row(where if given in (None, "") else str(given), messages, where, tuple(sorted(ignored)))


def _refuse_rendered(where: str, found: dict[str, Any], at: str = "") -> None:
    for key in _RENDERED:
        if found.get(key):
            raise RecipeError(f"{where}: {at}{key}: is not supported; a turn is its role and its content")


def _pair(where: str, record: dict[str, Any]) -> tuple[Message, ...]:
    missing = [key for key in ("prompt", "completion") if key not in record]
    if missing:
        raise RecipeError(f"{where}: {_columns_hint([str(column) for column in record], missing)}")
    prompt, completion = (_words(where, key, record[key]) for key in ("prompt", "completion"))
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})


def _messages(where: str, value: Any) -> tuple[tuple[Message, ...], set[str]]:
    """The checked turns, and the names of keys in them that are passed over."""
    if not isinstance(value, list) or not value:
        wanted = "a list of turns with role and content is expected"
        raise RecipeError(f"{where}: messages: is {'empty' if value == [] else _name(value)}; {wanted}")
    messages = tuple(_message(where, f"messages[{index}]", turn) for index, turn in enumerate(value))
    if messages[-1]["role"] != "assistant":
        raise RecipeError(f"{where}: messages: the last turn is {messages[-1]['role']}; it must be assistant")
    if messages[0]["role"] == "assistant":
        raise RecipeError(f"{where}: messages: the first turn is assistant; a system or user turn must come before it")
    extra = {key for turn in value for key, content in turn.items() if content is not None}
    return messages, {f"messages.{key}" for key in extra - {"role", "content"}}


def _message(where: str, at: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RecipeError(f"{where}: {at}: is {_name(turn)}; an object with role and content is expected")
    _refuse_rendered(where, turn, f"{at}.")
    for key, other in (("role", "from"), ("content", "value")):
        if key not in turn:
            hint = f"; rename {other} to {key}" if other in turn else nearest(key, [str(name) for name in turn])
            raise RecipeError(f"{where}: {at}.{key}: is missing{hint}")
    role = turn["role"]
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise RecipeError(f"{where}: {at}.role: is {role!r}, not one of {', '.join(ROLES)}{hint}")
    return {"role": role, "content": _words(where, f"{at}.content", turn["content"], may_be_empty=role == "system")}


def _words(where: str, key: str, value: Any, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: is {_name(value)}; text is expected")
    if not value.strip() and not may_be_empty:
        raise RecipeError(f"{where}: {key}: is empty; text is expected")
    return value


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    shown = f" ({value!r})" if isinstance(value, int | float) else ""
    return f"{names.get(type(value), type(value).__name__)}{shown}"


def _columns_hint(columns: list[str], missing: list[str]) -> str:
    """What the columns are and which of them to rename."""
    found = f"columns {', '.join(columns)}" if columns else "no columns"
    conversations = _like("messages", columns)
    if conversations and len(missing) == 2:
        return f"{found}: rename {conversations[0]} to messages"
    advice = list(_advice(columns, missing))
    if advice:
        return f"{found}: {' and '.join(advice)}"
    wanted = "messages, or prompt and completion, are expected" if len(missing) == 2 else f"{missing[0]} is missing"
    return f"{found}: {wanted}"


def _advice(columns: list[str], missing: list[str]) -> Iterator[str]:
    for key in missing:
        like = _like(key, [column for column in columns if column not in ("id", "prompt", "completion")])
        if len(like) > 1 and key == "prompt":
            yield f"join {' and '.join(like)} into {key}"
        elif like:
            yield f"rename {like[0]} to {key}"


def _like(key: str, columns: list[str]) -> list[str]:
    """The columns that go by another name for `key`, else the one that looks like a slip of it."""
    lower = {column.lower(): column for column in columns}
    named = [lower[word] for word in (key, *_SYNONYMS[key]) if word in lower]
    close = difflib.get_close_matches(key, list(lower), n=1, cutoff=0.75)
    return named or [lower[word] for word in close]
