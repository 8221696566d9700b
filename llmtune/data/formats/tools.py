"""Tools and calls of them, in the forms that data sets store them in, as chat templates take them."""

import functools
from typing import Any, NoReturn

from llmtune.data.formats.values import check_name, check_text, describe, dump_json, parse_json
from llmtune.data.row import Tool
from llmtune.errors import RecipeError

_TOOL = 'a tool, {"name": ..., "parameters": ...}, is expected'
_CALL = 'a call, {"name": ..., "arguments": {...}}, is expected'


def parse_tools(where: str, value: object) -> tuple[Tool, ...]:
    """Return the tools of a row: a list of OpenAI tools or bare functions, or that list as JSON text."""
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str):
        return _parse_text(where, value)
    return _parse_list(where, value)


def _parse_text(where: str, text: str) -> tuple[Tool, ...]:
    try:
        return _known_tools(text)
    except RecipeError as error:  # the place of the first row with this text
        raise RecipeError(f"{where}: {error}") from error


@functools.lru_cache(64)
def _known_tools(text: str) -> tuple[Tool, ...]:
    """Parse a JSON text of tools once, as many rows have the same."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise RecipeError(f"tools: is text that is no JSON ({error}); a list of tools is expected") from error
    return _parse_list("", value)


def _parse_list(where: str, value: object) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        _refuse(where, "tools", value, "a list of tools is expected")
    return tuple(_parse_tool(where, f"tools[{index}]", tool) for index, tool in enumerate(value))


def _parse_tool(where: str, key: str, tool: object) -> Tool:
    if isinstance(tool, str):
        tool = _load(where, key, tool, _TOOL)
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(tool, dict) or not isinstance(function, dict):
        _refuse(where, key, function, _TOOL)
    _check_name(where, f"{key}.name", function, _TOOL)
    dump_json(where, key, function)
    if function is tool:
        function = {name: part for name, part in tool.items() if name != "type"}
    return {"type": "function", "function": function}


def parse_calls(where: str, key: str, value: object) -> list[dict[str, Any]]:
    """Return the calls of a turn: a list, one call, or either as JSON text; arguments become an object."""
    if isinstance(value, str):
        value = _load(where, key, value, _CALL)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        _refuse(where, key, calls, "a list of calls is expected")
    return [_parse_call(where, f"{key}[{index}]", call) for index, call in enumerate(calls)]


def _parse_call(where: str, key: str, call: object) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(function, dict):
        _refuse(where, key, function, _CALL)
    inner = key if function is call else f"{key}.function"
    name = _check_name(where, f"{inner}.name", function, _CALL)
    parsed = {"name": name, "arguments": _parse_arguments(where, f"{inner}.arguments", function)}
    identity = call.get("id")
    known = {} if identity is None else {"id": check_name(where, f"{key}.id", identity)}
    return {"type": "function", **known, "function": parsed}


def _parse_arguments(where: str, key: str, function: dict[str, Any]) -> dict[str, Any]:
    if "arguments" not in function:
        raise RecipeError(f"{where}: {key}: is missing; {_CALL}")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _load(where, key, arguments, "an object, or its JSON text, is expected")
    if not isinstance(arguments, dict):
        _refuse(where, key, arguments, "an object, or its JSON text, is expected")
    dump_json(where, key, arguments)
    return arguments


def _check_name(where: str, key: str, function: dict[str, Any], expected: str) -> str:
    if function.get("name") is None:
        _refuse(where, key, None, expected, "is missing")
    return check_text(where, key, function["name"])


def _load(where: str, key: str, text: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RecipeError(f"{where}: {key}: is text that is no JSON ({error}); {expected}") from error


def _refuse(where: str, key: str, value: object, expected: str, problem: str = "") -> NoReturn:
    place = f"{where}: " if where else ""
    raise RecipeError(f"{place}{key}: {problem or f'is {describe(value)}'}; {expected}")
