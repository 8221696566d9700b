"""Checks of single values in a record; each error names the place, the key and what stands there."""

import json
from typing import Any

from llmtune.errors import RecipeError

_NO_HALVES = "; remove it or restore the character"


def check_text(where: str, key: str, value: object, may_be_empty: bool = False) -> str:
    """Return a text as it is; raises RecipeError for another type, and for an empty one."""
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key}: is {describe(value)}; text is expected")
    if not may_be_empty and (not value or value.isspace()):
        raise RecipeError(f"{where}: {key}: is empty; text is expected")
    if not value.isascii():
        refuse_half_characters(where, key, value)
    return value


def join_content(where: str, key: str, value: object, may_be_empty: bool = False) -> str:
    """Return the text of a turn, whose content is text or a list of text parts, which are joined."""
    if not isinstance(value, list):
        return check_text(where, key, value, may_be_empty)
    parts = [_part(where, f"{key}[{index}]", part) for index, part in enumerate(value)]
    return check_text(where, key, "".join(parts), may_be_empty)


def _part(where: str, key: str, part: object) -> str:
    if isinstance(part, str):
        return check_text(where, key, part, may_be_empty=True)
    if not isinstance(part, dict):
        raise RecipeError(f"{where}: {key}: is {describe(part)}; a text part is expected")
    kind = part.get("type") or "text"
    if kind != "text":
        raise RecipeError(f"{where}: {key}: is of type {kind!r}; llmtune trains on text alone")
    return check_text(where, f"{key}.text", part.get("text"), may_be_empty=True)


def optional_text(where: str, record: dict[str, Any], key: str) -> str:
    """Return a column's text, "" where it is absent, null or empty."""
    value = record.get(key)
    if value is None or value == "":
        return ""
    text = check_text(where, key, value, may_be_empty=True)
    return "" if text.isspace() else text


def check_name(where: str, key: str, value: object) -> str:
    """Return the text of an id or a name, which some data sets write as a number."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return check_text(where, key, str(value) if number else value, may_be_empty=True)


def parse_json(text: str) -> Any:
    """Parse JSON text; raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def dump_json(where: str, key: str, value: object) -> str:
    """Write a value as JSON text; raises RecipeError where it holds what JSON cannot."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: {key}: is no JSON value: {error}") from error
    if not text.isascii():
        refuse_half_characters(where, key, text)
    return text


def refuse_half_characters(where: str, key: str, text: str) -> None:
    """Raise RecipeError for a lone surrogate, which no tokenizer and no file of UTF-8 text takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RecipeError(
            f"{where}: {key}: holds half of a character ({half}, character {error.start + 1}), as of an emoji that was "
            f"cut in two{_NO_HALVES}"
        ) from error


def describe(value: object) -> str:
    """Say what kind of value stands somewhere: "a number (4)"."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    literal = f" ({value!r})" if isinstance(value, int | float) else ""
    return f"{names.get(type(value), type(value).__name__)}{literal}"
