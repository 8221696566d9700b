"""Finds rows with the same text across files, and holds out a share of the rows by their text."""

import hashlib
import json
import math
import re
from typing import NamedTuple

from llmtune.data.rows import Row

# White space and punctuation, except what turns one formula or line of code into another.
_NOISE = re.compile(r"[^\w+\-*/=<>%^&|~$@#\\]|_|(?<!\d)-(?!\d)")


class DedupKey(NamedTuple):
    """The text of a row without case, punctuation and white space: duplicates have equal keys."""

    content: str
    """The text of all turns."""
    prompt: str
    """The text of the turns before the last."""


def dedup_keys(rows: list[Row]) -> list[DedupKey]:
    """Compute the key of each row."""
    return [_dedup_key(row) for row in rows]


def find_overlap(rows: list[DedupKey], others: list[DedupKey]) -> tuple[list[int], list[int]]:
    """Return the indices of `rows` whose content is also in `others`, and of those that share only a prompt."""
    contents, prompts = {key.content for key in others}, {key.prompt for key in others}
    same_content = [index for index, key in enumerate(rows) if key.content in contents]
    same_prompt = {index for index, key in enumerate(rows) if key.prompt in prompts}
    return same_content, sorted(same_prompt - set(same_content))


def hold_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split rows into train and held-out (at least one row) by a hash of their content.

    Duplicates stay together, and the order of the rows does not matter.
    """
    hashes = [hashlib.sha256(key.content.encode()).hexdigest() for key in dedup_keys(rows)]
    distinct = sorted(set(hashes))
    count = min(math.ceil(fraction * len(distinct)), len(distinct) - 1)
    chosen = set(distinct[:count])
    pairs = list(zip(rows, hashes, strict=True))
    return [row for row, digest in pairs if digest not in chosen], [row for row, digest in pairs if digest in chosen]


def count_duplicates(rows: list[Row]) -> int:
    """Count the rows that repeat an earlier row exactly."""
    return len(rows) - len({json.dumps(row.messages) for row in rows})


def _dedup_key(row: Row) -> DedupKey:
    texts = [message["content"].lower() for message in row.messages]
    # A turn that is only punctuation keeps it: otherwise "?" and "!" would be equal.
    stripped = [_NOISE.sub("", text) or text.strip() for text in texts]
    return DedupKey("\x1f".join(stripped), "\x1f".join(stripped[:-1]))
