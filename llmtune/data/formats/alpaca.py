"""Rows as Alpaca writes them: instruction, input and output, with earlier turns as history."""

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.pairs import EXTRAS, parse_pair
from llmtune.data.formats.values import check_text, describe, optional_text
from llmtune.data.row import Message
from llmtune.errors import RecipeError


def _parse(where: str, record: Record) -> Content:
    """Parse a record: the input follows the instruction on a line of its own."""
    texts = [optional_text(where, record, key) for key in ("instruction", "input")]
    question = "\n".join(text for text in texts if text)
    if not question:
        check_text(where, "instruction", record["instruction"])
    content = parse_pair(where, record | {"instruction": question}, "instruction", "output")
    earlier = _history(where, record.get("history"))
    at = 1 if content.messages[0]["role"] == "system" else 0
    messages = (*content.messages[:at], *earlier, *content.messages[at:])
    there = [name for name in ("input", "history") if name in record]
    first, *rest = content.used
    return Content(messages, (first, *there, *rest), content.unused, content.tools)


def _history(where: str, history: object) -> list[Message]:
    """Return the earlier turns from pairs of question and answer."""
    if history is None or history == "" or history == []:
        return []
    if not isinstance(history, list):
        raise RecipeError(f"{where}: history: is {describe(history)}; a list of [question, answer] is expected")
    messages: list[Message] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecipeError(f"{where}: history[{index}]: is no pair; [question, answer] is expected")
        for role, number in (("user", 0), ("assistant", 1)):
            messages.append({"role": role, "content": check_text(where, f"history[{index}][{number}]", pair[number])})
    return messages


ALPACA = Format(
    "alpaca",
    ("instruction", "output"),
    ("input", "history", *EXTRAS),
    lambda record: "instruction" in record and "output" in record,
    _parse,
)
