"""Which training rows are nearly the same as others: candidates by bands of signatures, then their exact similarity."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmtune.data.mixture import drawn
from llmtune.data.near.shingles import LONGEST, PERMUTATIONS, WORDS, Sets, common_shingles, shingle_sets

Texts = Sequence[tuple[str, str]]
"""The id and the text of each row; it may read a row when it is asked for."""

JACCARD = 0.8
"""The share of common shingles, of all that either text has, from which two texts are nearly the same."""
MOST_ROWS, MOST_CHARACTERS = 100_000, 60_000_000
"""Rows and characters of a part that are compared; of a larger part, drawn rows are."""
# 21 bands of 6 find 99.8% of the pairs at 0.8; datasketch's own choice of 9 bands of 13 finds 40%.
_BANDS, _WIDTH = 21, 6
_ALIKE = 0.6
"""The share of equal signature places below which two sets are not compared."""
_TRIED = 4
"""Texts of one bucket that a text is compared with."""
_SAMPLED, _LISTED_IDS, _SEED = 1000, 20, 0


def near_duplicates(train: Texts, others: Mapping[str, Texts]) -> dict[str, Any]:
    """Count the train rows that nearly repeat an earlier one, and those nearly the same as a row of each other part.

    An exact repeat counts too. Of a part over the limits, drawn rows alone are compared.
    """
    common = _common(train)
    ids, sets, checked = _sets(train, common)
    findings: dict[str, Any] = {
        "method": {"jaccard": JACCARD, "words": WORDS, "permutations": PERMUTATIONS},
        "checked": {"train": checked},
        "train": _listed(ids, _near(sets, sets)),
    }
    for part, texts in others.items():
        _, other_sets, findings["checked"][part] = _sets(texts, common)
        findings[part] = _listed(ids, _near(sets, other_sets))
    return findings


def near_documents(train: Texts, documents: Texts) -> tuple[dict[str, Any], dict[str, int]]:
    """Count the train texts that are nearly the same as a document; returns them, and how many documents were read."""
    common = _common(train)
    ids, sets, _ = _sets(train, common)
    _, others, checked = _sets(documents, common)
    return _listed(ids, _near(sets, others)), checked


def _common(train: Texts) -> np.ndarray:
    """Return the shingles that many train rows share, by a sample: they make no two rows the same."""
    return common_shingles(text for _, text in _sample(train, _SAMPLED))


def _sample(texts: Texts, count: int) -> Iterator[tuple[str, str]]:
    """Yield about `count` of the texts, evenly spaced."""
    return (texts[index] for index in range(0, len(texts), max(1, len(texts) // count)))


def _sets(texts: Texts, common: np.ndarray) -> tuple[list[str], Sets, dict[str, int]]:
    """Return the ids and sets of as many texts as may be compared, and how many of how many they are."""
    chosen = _drawn(texts).tolist()
    ids: list[str] = []

    def read() -> Iterator[str]:
        for index in chosen:
            name, text = texts[index]
            ids.append(name)
            yield text

    sets = shingle_sets(read(), len(chosen), common)
    return ids, sets, {"rows": len(chosen), "of": len(texts)}


def _drawn(texts: Texts) -> np.ndarray:
    """Draw as many of the texts as may be compared: their indices, in order."""
    if not texts:
        return np.empty(0, np.int64)
    sample = [len(text[:LONGEST]) for _, text in _sample(texts, _SAMPLED)]
    fitting = int(MOST_CHARACTERS * len(sample) / max(1, sum(sample)))
    return drawn(len(texts), max(1, min(MOST_ROWS, fitting)), _SEED)


def _listed(ids: list[str], near: np.ndarray) -> dict[str, Any]:
    """Count the rows that are marked, and name the first of them."""
    names = [ids[index] for index in np.flatnonzero(near)]
    return {"rows": len(names), "ids": names[:_LISTED_IDS]}


def _near(sets: Sets, others: Sets) -> np.ndarray:
    """Mark the sets that are nearly one of the others; where these are the same ones, one before it."""
    near = np.zeros(len(sets.signatures), bool)
    for keys, other_keys in zip(_bands(sets), _bands(others), strict=True):
        order = np.argsort(other_keys, kind="stable")
        ordered = other_keys[order]
        first, last = np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")
        for place in range(_TRIED):
            own = np.flatnonzero((first + place < last) & ~near)
            at = order[first[own] + place]
            if sets is others:
                own, at = own[at < own], at[at < own]
            near[own[_are_near(sets, own, others, at)]] = True
    return near


def _bands(sets: Sets) -> Iterator[np.ndarray]:
    """Yield, band by band, a 64-bit key of each text: equal where the band's part of the signatures is."""
    multipliers = np.random.RandomState(_SEED).randint(1, 2**63, _WIDTH, np.uint64) * np.uint64(2) + np.uint64(1)
    for start in range(0, _BANDS * _WIDTH, _WIDTH):
        yield (sets.signatures[:, start : start + _WIDTH].astype(np.uint64) * multipliers).sum(1, dtype=np.uint64)


def _are_near(sets: Sets, own: np.ndarray, others: Sets, at: np.ndarray) -> np.ndarray:
    """Say of pairs of sets whether they are nearly the same: by their signatures, then by the sets themselves."""
    alike = (sets.signatures[own] == others.signatures[at]).mean(1) >= _ALIKE
    for pair in np.flatnonzero(alike).tolist():
        alike[pair] = sets.jaccard(int(own[pair]), others, int(at[pair])) >= JACCARD
    return alike
