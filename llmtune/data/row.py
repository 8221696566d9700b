"""A row: a conversation, or a plain text, that was read and checked."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn as chat templates take it: `role` and `content`; of an assistant also `reasoning_content` and `tool_calls`,
of a tool `name` and `tool_call_id`, where the row has them."""
Tool = dict[str, Any]
"""A tool as chat templates take it: {"type": "function", "function": {"name", "description", "parameters"}}."""


@dataclass(frozen=True)
class Row:
    """A checked row, whose last turn is the assistant's, or a plain text."""

    id: str
    messages: tuple[Message, ...]
    """The turns; none in a plain text."""
    where: str
    ignored: tuple[str, ...] = ()
    """Columns that llmtune does not use."""
    tools: tuple[Tool, ...] = ()
    """What the assistant may call."""
    text: str | None = None
    """A plain text, of which every token is learned."""
    source: str = ""
    """The source of a mixture that the row is from, as the recipe names it; "" where there is one source."""
    form: str = ""
    """The format that the row was recognised as, with its columns: "alpaca (instruction, output)"."""
    continues: str = ""
    """The place of the row before it, where a plain text is a piece of a document that was cut behind that row."""
    goes_on: bool = False
    """Whether the document of a plain text goes on in another row."""

    @property
    def prompt(self) -> list[Message]:
        """The turns before the last one; none of a plain text."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def answer(self) -> str:
        """The content of the last turn, or the plain text."""
        return str(self.messages[-1]["content"]) if self.text is None else self.text
