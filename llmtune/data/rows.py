"""Reads rows (chat messages, or prompt and completion) from any source and checks each of them."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.data.row import Message, Row
from llmtune.data.sources import Cursor, explained, records
from llmtune.errors import RecipeError, nearest
from llmtune.recipe.data import Data

ROLES = ("system", "user", "assistant")

# Other names of these columns, the most common first.
_SYNONYMS = {
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "prompt": ("instruction", "question", "query", "user", "source", "context", "input", "text"),
    "completion": ("output", "response", "answer", "target", "label", "assistant", "summary", "chosen"),
}
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""What ShareGPT files write as `from`, and the role that it is."""
# Chat templates render these keys: without them the model would train on another text than the row's.
_UNSUPPORTED = ("tool_calls", "function_call", "tools", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Form:
    """In which form a source's records are rows."""

    format: str = "auto"
    map: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data) -> "Form":
        """The form that a recipe's data section names."""
        return cls(data.format, data.map)


def read(source: str, default_split: str = "train", form: Form | None = None) -> list[Row]:
    """Read all rows of a source; raises RecipeError at the first bad one, and for a source without rows."""
    return list(iterate(source, default_split, form))


def iterate(source: str, default_split: str = "train", form: Form | None = None) -> Iterator[Row]:
    """Read the rows of a source one by one; raises RecipeError at the first bad one, and for a source without rows."""
    at, empty = Cursor(source), True
    with explained(at):
        for record in records(at, default_split):
            empty = False
            yield _parse_row(at.where, record)
    if empty:
        raise RecipeError(f"{source}: is empty: it has no rows")


def _parse_row(where: str, record: object) -> Row:
    """Check a record and return its row; raises RecipeError with its place and key."""
    if not isinstance(record, dict):
        raise RecipeError(
            f"{where}: holds {_describe(record)}; an object with messages, or prompt and completion, is expected"
        )
    for column in record:
        _refuse_half_characters(where, "the name of a column", str(column))
    _refuse_unsupported(where, record)
    if "messages" in record:
        messages, ignored = _parse_messages(where, record["messages"])
        known = {"messages", "id"}
    else:
        messages, ignored = _parse_pair(where, record), set()
        known = {"prompt", "completion", "id"}
    ignored |= {str(column) for column in record if column not in known}
    return Row(_identify(where, record.get("id")), messages, where, tuple(sorted(ignored)))


def _identify(where: str, name: object) -> str:
    """Return the row's id, its place where it has none."""
    if name is None or name == "":
        return where
    _refuse_half_characters(where, "id", str(name))
    return str(name)


def _refuse_unsupported(where: str, mapping: dict[str, Any], at: str = "") -> None:
    for key in _UNSUPPORTED:
        if mapping.get(key):
            raise RecipeError(f"{where}: {at}{key}: is not supported; a turn has role and content only")


def _parse_pair(where: str, record: dict[str, Any]) -> tuple[Message, ...]:
    missing = [key for key in ("prompt", "completion") if key not in record]
    if missing:
        raise RecipeError(f"{where}: {_columns_hint(record, missing)}")
    prompt, completion = (_check_text(where, key, record[key]) for key in ("prompt", "completion"))
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})


def _parse_messages(where: str, value: object) -> tuple[tuple[Message, ...], set[str]]:
    """Return the checked turns, and the names of keys in them that are not used."""
    if not isinstance(value, list) or not value:
        content = "empty" if value == [] else _describe(value)
        raise RecipeError(f"{where}: messages: is {content}; a list of turns with role and content is expected")
    messages = tuple(_parse_message(where, f"messages[{index}]", turn) for index, turn in enumerate(value))
    if messages[-1]["role"] != "assistant":
        raise RecipeError(f"{where}: messages: the last turn is {messages[-1]['role']}; it must be assistant")
    if messages[0]["role"] == "assistant":
        raise RecipeError(f"{where}: messages: the first turn is assistant; a system or user turn must come before it")
    extra = {str(key) for turn in value for key, content in turn.items() if content is not None}
    for key in extra:
        _refuse_half_characters(where, "the name of a key in messages", key)
    return messages, {f"messages.{key}" for key in extra - {"role", "content"}}


def _parse_message(where: str, at: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise RecipeError(f"{where}: {at}: is {_describe(turn)}; an object with role and content is expected")
    _refuse_unsupported(where, turn, f"{at}.")
    for key, other in (("role", "from"), ("content", "value")):
        if key not in turn:
            hint = f"; rename {other} to {key}" if other in turn else nearest(key, [str(name) for name in turn])
            raise RecipeError(f"{where}: {at}.{key}: is missing{hint}")
    role = turn["role"]
    if role not in ROLES:
        hint = _role_hint(role) if isinstance(role, str) else ""
        raise RecipeError(f"{where}: {at}.role: is {role!r}, not one of {', '.join(ROLES)}{hint}")
    content = _check_text(where, f"{at}.content", turn["content"], may_be_empty=role == "system")
    return {"role": role, "content": content}


def _role_hint(role: str) -> str:
    return f"; write {_SPEAKERS[role]}" if role in _SPEAKERS else nearest(role, list(ROLES))


def _check_text(where: str, key: str, value: object, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: is {_describe(value)}; text is expected")
    if not value.strip() and not may_be_empty:
        raise RecipeError(f"{where}: {key}: is empty; text is expected")
    _refuse_half_characters(where, key, value)
    return value


def _refuse_half_characters(where: str, key: str, text: str) -> None:
    """Raise RecipeError for a lone surrogate, which no tokenizer and no file of UTF-8 text takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RecipeError(
            f"{where}: {key}: holds half of a character ({half}, character {error.start + 1}), as of an emoji that was "
            "cut in two; remove it or restore the character"
        ) from error


def _describe(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    literal = f" ({value!r})" if isinstance(value, int | float) else ""
    return f"{names.get(type(value), type(value).__name__)}{literal}"


def _columns_hint(record: dict[str, Any], missing: list[str]) -> str:
    """Name the columns of a row and say which of them to rename."""
    columns = [str(column) for column in record]
    names = f"columns {', '.join(columns)}" if columns else "no columns"
    conversations = _similar("messages", columns)
    if conversations and len(missing) == 2:
        return f"{names}: rename {conversations[0]} to messages{_turns_hint(record.get(conversations[0]))}"
    advice = list(_advice(columns, missing))
    if advice:
        return f"{names}: {' and '.join(advice)}"
    problem = "messages, or prompt and completion, are expected" if len(missing) == 2 else f"{missing[0]} is missing"
    return f"{names}: {problem}"


def _turns_hint(turns: object) -> str:
    """Say what else to rename in a conversation as ShareGPT writes it; "" for one that is written otherwise."""
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "from" in turn for turn in turns):
        return ""
    speakers = dict.fromkeys(str(turn.get("from")) for turn in turns if isinstance(turn, dict))
    roles = [f"{name} to {_SPEAKERS[name]}" for name in speakers if name in _SPEAKERS]
    return f"; in each turn from to role, value to content{', and as roles ' if roles else ''}{', '.join(roles)}"


def _advice(columns: list[str], missing: list[str]) -> Iterator[str]:
    for key in missing:
        similar = _similar(key, [column for column in columns if column not in ("id", "prompt", "completion")])
        if len(similar) > 1 and key == "prompt":
            yield f"join {' and '.join(similar)} into {key}"
        elif similar:
            yield f"rename {similar[0]} to {key}"


def _similar(key: str, columns: list[str]) -> list[str]:
    """Return the columns that are synonyms of `key`, else the one that looks like a typo of it."""
    lower = {column.lower(): column for column in columns}
    synonyms = [lower[word] for word in (key, *_SYNONYMS[key]) if word in lower]
    close = difflib.get_close_matches(key, list(lower), n=1, cutoff=0.75)
    return synonyms or [lower[word] for word in close]
