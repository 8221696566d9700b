"""Finds rows with the same text across files, and holds out a share of the rows by their text."""

import hashlib
import json
import math
import re
import unicodedata
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llmtune.data.row import Message, Row

Digests = npt.NDArray[np.bytes_]
"""Hashes of 16 bytes, one a row."""
Places = npt.NDArray[np.intp]
"""Places of rows among others."""

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


class RowHashes(NamedTuple):
    """What is compared of a row, as the first 16 bytes of SHA-256."""

    content: bytes
    prompt: bytes
    exact: bytes
    """Of the row as it is: equal for exact repetitions."""


class Hashes(Protocol):
    """The hashes of many rows."""

    @property
    def contents(self) -> Digests:
        """Of their contents."""

    @property
    def prompts(self) -> Digests:
        """Of their prompts."""


def dedup_key(row: Row) -> DedupKey:
    """Compute the key of a row; what an assistant calls is part of its turn's text."""
    if not row.messages:
        return DedupKey(_strip(row.text or ""), "")
    turns = [_strip(str(message.get("content") or "")) + _calls(message) for message in row.messages]
    return DedupKey("\x1f".join(turns), "\x1f".join(turns[:-1]))


def hash_row(row: Row) -> RowHashes:
    """Compute the hashes of a row; a plain text has no prompt that another row may share."""
    key = dedup_key(row)
    content = _hash(key.content)
    exact = _hash(json.dumps([row.messages, row.tools, row.text]))
    return RowHashes(content, _hash(key.prompt) if row.messages else content, exact)


def find_overlap(rows: Hashes, others: Hashes) -> tuple[Places, Places]:
    """Return the places of the rows whose content is also in `others`, and of those that share only a prompt."""
    same_content = np.isin(rows.contents, others.contents)
    same_prompt = np.isin(rows.prompts, others.prompts) & ~same_content
    return np.flatnonzero(same_content), np.flatnonzero(same_prompt)


def hold_out(contents: Digests, fraction: float, sources: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Choose the rows to hold out (at least one) by the hashes of their content, each source of a mixture alike.

    Duplicates stay together, and the order of the rows does not matter. Returns a mask.
    """
    lowest = [_lowest(np.unique(contents[sources == source]), fraction) for source in np.unique(sources)]
    return np.isin(contents, np.concatenate(lowest)) if lowest else np.zeros(len(contents), bool)


def share_of(contents: Digests, share: float) -> Places:
    """Choose a share of rows, at least one, by the hashes of their content: their places, in order.

    What a smaller share chooses is part of what a larger one does, and neither depends on the order of the rows.
    """
    if share == 1:
        return np.arange(len(contents))
    # Not by the hashes as they are: their lowest are held out, and a share is drawn from the rest.
    order = np.array([hashlib.sha256(b"share" + bytes(one)).digest()[:16] for one in contents.tolist()], "S16")
    return np.sort(np.argsort(order, kind="stable")[: max(1, round(share * len(contents)))])


def _lowest(distinct: Digests, fraction: float) -> Digests:
    """Return the lowest of a source's hashes, as many as are held out; the highest always trains."""
    return distinct[: min(math.ceil(fraction * len(distinct)), len(distinct) - 1)]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _calls(message: Message) -> str:
    calls = message.get("tool_calls")
    return f"\x1e{json.dumps([call['function'] for call in calls], sort_keys=True)}" if calls else ""


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
