"""Finds rows with the same text across files, and holds out a share of the rows by their text."""

import hashlib
import json
import math
import re
import unicodedata
from typing import NamedTuple

from llmtune.data.row import Row

# Letters, marks, digits and symbols of every script stay: a vowel sign, an arrow or an emoji changes what a row says.
_NOISE_KINDS = ("P", "Z", "Cc", "Cf")
_SIGNS = "*/%&@#\\٪‰‱"
"""Punctuation, to Unicode, that turns one formula or line of code into another."""
_BETWEEN_DIGITS = re.compile(r"\d[\W_]++(?=\d)")
_SIGN_OF_A_NUMBER = re.compile(r"-(?:(?=\d)|(?<=\d-))")


class _Noise(dict[int, int | None]):
    """What `str.translate` makes of a character: nothing of punctuation, white space and control characters."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        is_noise = unicodedata.category(char).startswith(_NOISE_KINDS) and char not in _SIGNS
        self[code] = None if is_noise or char == "`" else code
        return self[code]


_noise = _Noise()


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
    """Split rows into train and held-out (at least one row) by a hash of their content, each source of a mixture alike.

    Duplicates stay together, and the order of the rows does not matter.
    """
    hashes = [hashlib.sha256(key.content.encode()).hexdigest() for key in dedup_keys(rows)]
    pairs = list(zip(rows, hashes, strict=True))
    of_source: dict[str, set[str]] = {}
    for row, digest in pairs:
        of_source.setdefault(row.source, set()).add(digest)
    chosen = {digest for digests in of_source.values() for digest in _lowest(digests, fraction)}
    return [row for row, digest in pairs if digest not in chosen], [row for row, digest in pairs if digest in chosen]


def _lowest(digests: set[str], fraction: float) -> list[str]:
    """Return the lowest of a source's hashes, as many as are held out; the highest always trains."""
    return sorted(digests)[: min(math.ceil(fraction * len(digests)), len(digests) - 1)]


def count_duplicates(rows: list[Row]) -> int:
    """Count the rows that repeat an earlier row exactly."""
    return len(rows) - len({json.dumps(row.messages) for row in rows})


def _dedup_key(row: Row) -> DedupKey:
    stripped = [_strip(message["content"]) for message in row.messages]
    return DedupKey("\x1f".join(stripped), "\x1f".join(stripped[:-1]))


def _strip(text: str) -> str:
    """Return a text without case, punctuation and white space, in Unicode's composed form.

    What stands between two digits stays (3.5 is not 35), and a text of punctuation alone keeps it (? is not !).
    """
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    signs = _SIGN_OF_A_NUMBER.sub("\N{MINUS SIGN}", " ".join(composed.split())).replace("!=", "≠")
    return _BETWEEN_DIGITS.sub(_as_letters, signs).translate(_noise) or composed.strip()


def _as_letters(match: re.Match[str]) -> str:
    """Write what follows a digit as letters, which stay."""
    return f"{match[0][0]}\ue000{match[0][1:].encode().hex()}\ue000"
