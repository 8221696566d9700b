"""Plain text, of which every token is learned."""

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.values import check_text

_ANSWERS = frozenset(
    ("prompt", "instruction", "completion", "output", "response", "answer", "answers", "target", "label", "summary")
)
"""Columns beside which a text is a question, or one half of a row."""


def _parse(where: str, record: Record) -> Content:
    return Content((), ("text",), text=check_text(where, "text", record["text"]))


TEXT = Format(
    "text",
    ("text",),
    (),
    lambda record: "text" in record and _ANSWERS.isdisjoint(record),
    _parse,
    says="every token is learned",
)
