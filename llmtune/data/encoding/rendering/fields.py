"""Which fields of a row a chat template renders: what it leaves out is an error by name, as nobody would learn it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmtune.data.encoding.rendering.reasoning import FIELDS, empty_block_end
from llmtune.data.encoding.template import Renderer, Request
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import RecipeError, one_line

_MARK = "markqzx"
_SHOWN = 40
"""Characters of a value in a message."""


class DroppedField(RecipeError):  # noqa: N818
    """The chat template leaves out a part of a row."""


@dataclass(frozen=True)
class Fields:
    """What a template renders, found by rendering."""

    renderer: Renderer

    @cached_property
    def reasoning(self) -> str:
        """The key under which it takes reasoning; "inline" for think tags in the content, "" where it drops both."""
        forms: dict[str, dict[str, str]] = {key: {"content": "b", key: _MARK} for key in FIELDS}
        if "<think>" in str(self.renderer.tokenizer.chat_template):
            forms["inline"] = {"content": f"<think>\n{_MARK}\n</think>\n\nb"}
        for form, answer in forms.items():
            if self._renders([_user(), {"role": "assistant", **answer}], _MARK):
                return form
        return ""

    @cached_property
    def block(self) -> str:
        """The empty thinking block that it puts before an answer without reasoning; "" for none."""
        messages = [_user(), {"role": "assistant", "content": _MARK}]
        try:
            prompt = self.renderer.render(Request(messages[:1], (), generation_prompt=True), "a probe")
            text, mark, _ = self.renderer.render(Request(messages), "a probe").partition(_MARK)
        except RecipeError:
            return ""
        is_block = mark and text.startswith(prompt) and empty_block_end(text, len(prompt), len(text)) > len(prompt)
        return text[len(prompt) :] if is_block else ""

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether it takes the arguments of a call as JSON text alone, not as the mapping that is usual."""
        texts = []
        for arguments in ({"a": _MARK}, json.dumps({"a": _MARK})):
            function = {"name": "b", "arguments": arguments}
            call = {"type": "function", "id": "a12345678", "function": function}
            texts.append(self._renders([_user(), {"role": "assistant", "content": "", "tool_calls": [call]}], _MARK))
        return texts == [False, True]

    @cached_property
    def dropped_of_tools(self) -> list[str]:
        """What it leaves out of tools."""
        marks = {part: f"{_MARK}{part}" for part in ("name", "description", "parameters")}
        properties = {marks["parameters"]: {"type": "string", "description": "a"}}
        function = {
            "name": marks["name"],
            "description": marks["description"],
            "parameters": {"type": "object", "properties": properties, "required": []},
        }
        tool = {"type": "function", "function": function}
        return [part for part, mark in marks.items() if not self._renders([_user()], mark, [tool])]

    def _renders(self, messages: Sequence[Message], mark: str, tools: Sequence[Tool] = ()) -> bool:
        try:
            return mark in self.renderer.render(Request(messages, tools), "a probe")
        except RecipeError:
            return False

    def check_tools(self, row: Row) -> None:
        """Raise DroppedField for tools that the template does not render."""
        if not row.tools:
            return
        if "name" in self.dropped_of_tools:
            raise DroppedField(
                f"{row.where}: has tools, but the chat template takes no tools; "
                "use a base whose template does, or remove the tools and their calls"
            )
        functions = [tool.get("function", tool) for tool in row.tools]
        for part in self.dropped_of_tools:
            if any(function.get(part) for function in functions):
                raise DroppedField(f"{row.where}: the chat template does not render the {part} of tools")

    def check_row(self, row: Row, text: str) -> None:
        """Raise DroppedField for a system turn, a tool, a call or a result that stands nowhere in the row's text."""
        for tool in row.tools:
            self._check(row, text, "the tool", [str(tool.get("function", tool).get("name", ""))])
        for message in row.messages:
            if message["role"] == "system":
                self._check(row, text, "the system turn", [message["content"]])
            elif message["role"] == "tool":
                self._check(row, text, "a tool's result", [message["content"]])
            elif message.get("tool_calls"):
                self._check(row, text, "tool_calls", call_texts(message))

    def _check(self, row: Row, text: str, name: str, values: list[str]) -> None:
        missing = next((value for value in values if not any(form in text for form in written_forms(value))), None)
        if missing is not None:
            shown = one_line(missing.strip(), _SHOWN)
            raise DroppedField(f"{row.where}: the chat template does not render {name} ({shown!r})")


def check_thought(row: Row, message: Message, thought: str, text: str) -> None:
    """Raise DroppedField where the reasoning of an answer is not in the text that ends with the answer."""
    if thought.strip() not in text:
        shown = thought.strip()[:30]
        inline = "" if message.get(FIELDS[0]) else " (<think> in its content)"
        raise DroppedField(
            f"{row.where}: the chat template drops the reasoning of an answer{inline}: {shown!r}; "
            "use data.reasoning: drop"
        )


def call_texts(message: Message) -> list[str]:
    """Return the names and the argument values of a turn's tool calls."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [text for function in functions for text in (function["name"], *_leaves(function.get("arguments")))]


def with_text_arguments(message: Message) -> Message:
    """Return a turn whose tool calls have their arguments as JSON text."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function.get("arguments") or {}, ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**call["function"], "arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def written_forms(value: str) -> list[str]:
    """Return how a template may write a value: as it is, stripped, or as JSON writes it."""
    return [value, value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _user() -> Message:
    return {"role": "user", "content": "a"}
