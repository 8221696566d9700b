"""The list of formats, and which of them a record is."""

from collections.abc import Collection

from llmtune.data.formats.alpaca import ALPACA
from llmtune.data.formats.base import Format, Record
from llmtune.data.formats.chat import CHAT
from llmtune.data.formats.pairs import PROMPT_COMPLETION
from llmtune.data.formats.preference import PREFERENCE
from llmtune.data.formats.sharegpt import SHAREGPT
from llmtune.data.formats.text import TEXT

FORMATS = (CHAT, SHAREGPT, PREFERENCE, PROMPT_COMPLETION, ALPACA, TEXT)
"""All formats; a record that fits several of them is the first."""
NAMES = {format.name: format for format in FORMATS}


def recognize(record: Record, filled: Collection[str] = ()) -> Format | None:
    """Return the format of a record, of those that have the fields that data.map fills; None if it fits none.

    A column without a value counts only where nothing else tells, as tables give every row the columns of all.
    """
    candidates = with_fields(filled) if filled else FORMATS
    for format in candidates:
        if format.fits(record):
            if None not in record.values():
                return format
            break
    else:
        return None
    valued = {name: value for name, value in record.items() if value is not None}
    return next((other for other in candidates if other.fits(valued)), format)


def with_fields(names: Collection[str]) -> tuple[Format, ...]:
    """The formats that have all of these fields."""
    return tuple(format for format in FORMATS if set(names) <= set(format.fields))
