"""Preferences: two answers, of which the chosen one is learned."""

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.pairs import EXTRAS, parse_pair, with_extras
from llmtune.data.formats.turns import parse_conversation
from llmtune.errors import RecipeError


def _parse(where: str, record: Record) -> Content:
    """Parse the chosen answer: a whole conversation, or what follows the prompt."""
    chosen = record["chosen"]
    if _is_conversation(chosen):
        messages, unused = parse_conversation(where, "chosen", chosen)
        return with_extras(where, record, messages, ("chosen",), unused)
    if record.get("prompt") is None:
        raise RecipeError(f"{where}: prompt: is missing; chosen is an answer alone, without the question")
    return parse_pair(where, record, "prompt", "chosen")


def _is_conversation(chosen: object) -> bool:
    """Whether turns start with a question."""
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    return isinstance(first, dict) and first.get("role") != "assistant"


PREFERENCE = Format(
    "preference",
    ("chosen", "rejected"),
    ("prompt", *EXTRAS),
    lambda record: "chosen" in record and "rejected" in record,
    _parse,
    says="chosen is learned, rejected is not used",
)
