"""Prompt and completion, each a text or a list of turns."""

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.tools import parse_tools
from llmtune.data.formats.turns import REASONING, answer, check_ends, parse_turns
from llmtune.data.formats.values import check_text, optional_text
from llmtune.data.row import Message, Tool

EXTRAS = ("system", "tools", *REASONING)
"""Columns that rows of a question and an answer may have besides."""


def parse_pair(where: str, record: Record, prompt: str, completion: str) -> Content:
    """Parse the columns of a question and an answer, and what else the record says of them."""
    question, answered = record[prompt], record[completion]
    unused: frozenset[str] = frozenset()
    if isinstance(question, list):
        before, unused = parse_turns(where, prompt, question)
    else:
        before = ({"role": "user", "content": check_text(where, prompt, question)},)
    if isinstance(answered, list):
        after, more = parse_turns(where, completion, answered)
        unused |= more
    else:
        after = (_answer(where, record, completion),)
    messages = (*before, *after)
    check_ends(where, completion, messages, prompt)
    return with_extras(where, record, messages, (prompt, completion), unused)


def with_extras(
    where: str, record: Record, messages: tuple[Message, ...], used: tuple[str, ...], unused: frozenset[str]
) -> Content:
    """Add the system text and the tools of a record to its turns."""
    there = tuple(name for name in EXTRAS if name in record)
    tools: tuple[Tool, ...] = ()
    if there:
        system = optional_text(where, record, "system") if messages[0]["role"] != "system" else ""
        messages = ({"role": "system", "content": system}, *messages) if system else messages
        tools = parse_tools(where, record.get("tools"))
    return Content(messages, (*used, *there), unused, tools)


def _answer(where: str, record: Record, column: str) -> Message:
    """Make the answer's turn, with its reasoning where a column holds it."""
    reasoning = next((name for name in REASONING if record.get(name)), "")
    return answer(where, column, record[column], record.get(reasoning), reasoning)


PROMPT_COMPLETION = Format(
    "prompt_completion",
    ("prompt", "completion"),
    EXTRAS,
    lambda record: "prompt" in record and "completion" in record,
    lambda where, record: parse_pair(where, record, "prompt", "completion"),
)
