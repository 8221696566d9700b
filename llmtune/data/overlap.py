"""Which rows say the same: comparison across files, and a share set aside by content."""

import hashlib
import json
import math
import re
from typing import NamedTuple

from llmtune.data.rows import Row

# White space and punctuation, but not what makes a sum or a line of code another one.
_NOISE = re.compile(r"[^\w+\-*/=<>%^&|~$@#\\]|_|(?<!\d)-(?!\d)")


class Key(NamedTuple):
    """What rows have in common that say the same but for case, punctuation and white space."""

    content: str
    """Of all turns."""
    prompt: str
    """Of the turns before the last."""


def keys(rows: list[Row]) -> list[Key]:
    """The key of each row."""
    return [_key(row) for row in rows]


def shared(rows: list[Key], others: list[Key]) -> tuple[list[int], list[int]]:
    """Places in `rows` of those that also stand in `others`, and of those that share the prompt only."""
    contents, prompts = {key.content for key in others}, {key.prompt for key in others}
    whole = [place for place, key in enumerate(rows) if key.content in contents]
    asked = {place for place, key in enumerate(rows) if key.prompt in prompts}
    return whole, sorted(asked - set(whole))


def set_aside(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """The rows without and with a fraction (at least one) by content: equal rows stay together, order plays no part."""
    hashes = [hashlib.sha256(key.content.encode()).hexdigest() for key in keys(rows)]
    distinct = sorted(set(hashes))
    count = min(math.ceil(fraction * len(distinct)), len(distinct) - 1)
    chosen = set(distinct[:count])
    pairs = list(zip(rows, hashes, strict=True))
    return [row for row, digest in pairs if digest not in chosen], [row for row, digest in pairs if digest in chosen]


def duplicates(rows: list[Row]) -> int:
    """How many rows repeat an earlier one exactly."""
    return len(rows) - len({json.dumps(row.messages) for row in rows})


def _key(row: Row) -> Key:
    texts = [message["content"].lower() for message in row.messages]
    # A turn of punctuation only is itself.
    plain = [_NOISE.sub("", text) or text.strip() for text in texts]
    return Key("\x1f".join(plain), "\x1f".join(plain[:-1]))
