"""Turns of a conversation, in the forms that data sets store them in, as chat templates take them."""

import re
from typing import Any, NamedTuple, NoReturn

from llmtune.data.formats.tools import parse_calls
from llmtune.data.formats.values import (
    check_name,
    check_text,
    describe,
    dump_json,
    join_content,
    refuse_half_characters,
)
from llmtune.data.row import Message
from llmtune.errors import RecipeError, nearest

ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
"""Roles of turns whose content is a call."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What data sets call the reasoning before an answer."""
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_KEYS = {
    "system": frozenset(),
    "user": frozenset(),
    "assistant": frozenset(("tool_calls", "function_call", *REASONING)),
    "tool": frozenset(("name", "tool_call_id")),
}


class Keys(NamedTuple):
    """The keys of a turn."""

    role: str
    content: str


OPENAI, SHAREGPT = Keys("role", "content"), Keys("from", "value")


def parse_conversation(where: str, column: str, value: object) -> tuple[tuple[Message, ...], frozenset[str]]:
    """Return the checked turns of a whole conversation, and the names of keys in them that are not used."""
    messages, unused = parse_turns(where, column, value)
    check_ends(where, column, messages)
    return messages, unused


def parse_turns(
    where: str, column: str, value: object, keys: Keys = OPENAI
) -> tuple[tuple[Message, ...], frozenset[str]]:
    """Return checked turns, which may be a part of a conversation, and the names of keys that are not used."""
    if not isinstance(value, list) or not value:
        content = "empty" if value == [] else describe(value)
        expected = f"a list of turns with {keys.role} and {keys.content} is expected"
        raise RecipeError(f"{where}: {column}: is {content}; {expected}")
    unused: set[str] = set()
    messages = tuple(
        _parse_turn(where, f"{column}[{index}]", turn, keys, column, unused) for index, turn in enumerate(value)
    )
    return messages, frozenset(unused)


def is_assistant(turn: object, keys: Keys = OPENAI) -> bool:
    """Whether a turn is the assistant's, by any name of that role."""
    role = turn.get(keys.role) if isinstance(turn, dict) else None
    return isinstance(role, str) and _OTHER_ROLES.get(role, role) == "assistant"


def check_ends(where: str, column: str, messages: tuple[Message, ...], first_column: str = "") -> None:
    """Raise RecipeError where the first turn is no one's question, or the last one is not the assistant's.

    `column` holds the last turn, and the first one too where no other column is named.
    """
    first, last = messages[0]["role"], messages[-1]["role"]
    if last != "assistant":
        raise RecipeError(f"{where}: {column}: the last turn is {last}; it must be assistant")
    if first not in ("system", "user"):
        place = f"{where}: {first_column or column}"
        raise RecipeError(f"{place}: the first turn is {first}; a system or user turn must come before it")


def split_thought(text: str) -> tuple[str, str]:
    """Return the reasoning and the answer of a text that starts with a <think> block; no reasoning for any other."""
    match = _THOUGHT.fullmatch(text)
    return (match[1].strip("\n"), match[2].lstrip("\n")) if match else ("", text)


def answer(where: str, key: str, text: object, reasoning: object = None, reasoning_key: str = "") -> Message:
    """Make the assistant's turn from a text, and the reasoning before it if there is any."""
    content = join_content(where, key, text)
    thought = check_text(where, reasoning_key, reasoning, may_be_empty=True) if reasoning else ""
    if not thought and "</think>" in content:
        thought, content = split_thought(content)
        check_text(where, key, content)
    return _assistant_turn(content, thought)


def _assistant_turn(content: str, thought: str) -> Message:
    if thought and not thought.isspace():
        return {"role": "assistant", "content": content, "reasoning_content": thought}
    return {"role": "assistant", "content": content}


def _parse_turn(where: str, at: str, turn: object, keys: Keys, column: str, unused: set[str]) -> Message:
    if not isinstance(turn, dict):
        raise RecipeError(f"{where}: {at}: is {describe(turn)}; an object with {' and '.join(keys)} is expected")
    name = _role(where, at, turn, keys)
    role = _OTHER_ROLES.get(name, name)
    if len(turn) > 2:
        extra = {str(key) for key, value in turn.items() if value is not None} - set(keys) - _KEYS[role]
        for key in extra:
            refuse_half_characters(where, f"the name of a key in {column}", key)
        unused |= {f"{column}.{key}" for key in extra}
    key = f"{at}.{keys.content}"
    if role == "assistant":
        return _assistant(where, at, turn, keys, name)
    if keys.content not in turn:
        _refuse_missing(where, at, turn, keys.content)
    if role == "tool":
        return _tool(where, at, turn, key, turn[keys.content])
    return {"role": role, "content": join_content(where, key, turn[keys.content], may_be_empty=role == "system")}


def _role(where: str, at: str, turn: dict[str, Any], keys: Keys) -> str:
    if keys.role not in turn:
        _refuse_missing(where, at, turn, keys.role)
    role = turn[keys.role]
    if not isinstance(role, str) or (role not in ROLES and role not in _OTHER_ROLES):
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise RecipeError(f"{where}: {at}.{keys.role}: is {role!r}, not one of {', '.join(ROLES)}{hint}")
    return role


def _assistant(where: str, at: str, turn: dict[str, Any], keys: Keys, name: str) -> Message:
    key, content = f"{at}.{keys.content}", turn.get(keys.content)
    if name in _CALLS:
        return {"role": "assistant", "content": "", "tool_calls": parse_calls(where, key, content)}
    calls = _calls(where, at, turn) if len(turn) > 2 or keys.content not in turn else []
    reasoning = next((other for other in REASONING if turn.get(other)), "") if len(turn) > 2 else ""
    if calls and (content is None or content == "" or content == []):
        message: Message = {"role": "assistant", "content": ""}
        if reasoning:
            message["reasoning_content"] = check_text(where, f"{at}.{reasoning}", turn[reasoning])
    elif keys.content not in turn:
        _refuse_missing(where, at, turn, keys.content)
    elif calls:
        message = _beside_calls(where, key, content, turn.get(reasoning), f"{at}.{reasoning}")
    else:
        message = answer(where, key, content, turn.get(reasoning), f"{at}.{reasoning}")
    return message | {"tool_calls": calls} if calls else message


def _beside_calls(where: str, key: str, content: object, reasoning: object, reasoning_key: str) -> Message:
    """Make the turn of an assistant that calls tools and says something, or only thinks, before."""
    text = join_content(where, key, content, may_be_empty=True)
    thought, rest = ("", text) if reasoning else split_thought(text)
    if reasoning:
        thought = check_text(where, reasoning_key, reasoning, may_be_empty=True)
    return _assistant_turn(rest, thought)


def _calls(where: str, at: str, turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of a turn, from either of the keys that hold them."""
    key = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    return parse_calls(where, f"{at}.{key}", turn[key]) if key else []


def _tool(where: str, at: str, turn: dict[str, Any], key: str, content: object) -> Message:
    """Make the turn of a tool, whose result may be any JSON value."""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content)
    if isinstance(content, str) or content is None or (content and is_parts):
        text = join_content(where, key, content, may_be_empty=True)
    else:
        text = dump_json(where, key, content)
    known = {name: turn[name] for name in ("name", "tool_call_id") if turn.get(name) is not None}
    return {"role": "tool", "content": text} | {
        name: check_name(where, f"{at}.{name}", value) for name, value in known.items()
    }


def _refuse_missing(where: str, at: str, turn: dict[str, Any], key: str) -> NoReturn:
    other = {"role": "from", "content": "value"}.get(key, "")
    hint = f"; rename {other} to {key}" if other in turn else nearest(key, [str(name) for name in turn])
    raise RecipeError(f"{where}: {at}.{key}: is missing{hint}")
