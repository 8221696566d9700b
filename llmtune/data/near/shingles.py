"""Texts as sets of hashed shingles, runs of five words, and the MinHash signatures of the sets."""

import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

WORDS = 5
"""Words of a shingle."""
PERMUTATIONS = 128
LONGEST = 100_000
"""Characters of a text that are compared; what follows is not read."""
_PIECE = 4096
"""Shingles that are permuted at a time: a book would take gigabytes."""
# Scripts that put no space between words: each of their letters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_COMMON = 0.05
_NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Sets:
    """The shingle sets of texts, end to end, and a signature of each."""

    shingles: np.ndarray
    """Sorted 64-bit hashes of each set, one set after the other."""
    starts: np.ndarray
    """Where each set starts, and the end of the last: texts + 1."""
    signatures: np.ndarray
    """Texts x PERMUTATIONS of 32 bits."""

    def jaccard(self, index: int, other: "Sets", at: int) -> float:
        """The exact Jaccard similarity of a set of these and one of others."""
        first = self.shingles[self.starts[index] : self.starts[index + 1]]
        second = other.shingles[other.starts[at] : other.starts[at + 1]]
        common = len(np.intersect1d(first, second, assume_unique=True))
        return common / (len(first) + len(second) - common)


def common_shingles(texts: Iterable[str]) -> np.ndarray:
    """Return, sorted, the shingles of 5% of the texts and of ten: the words of an instruction that comes with each."""
    sets = [hash_shingles(text) for text in texts]
    shingles, counts = np.unique(np.concatenate([*sets, _NONE]), return_counts=True)
    return shingles[counts >= max(10, _COMMON * len(sets))]


def shingle_sets(texts: Iterable[str], count: int, common: np.ndarray) -> Sets:
    """Compute the sets and signatures of `count` texts, which are read one by one.

    `common` shingles are left out of texts that have others.
    """
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    signatures = np.empty((count, PERMUTATIONS), np.uint32)
    starts, sets = np.zeros(count + 1, np.int64), []
    for index, text in enumerate(texts):
        shingles = _without(hash_shingles(text), common)
        sketch.clear()
        for piece in range(0, len(shingles), _PIECE):
            sketch.update_batch((shingles[piece : piece + _PIECE] >> _HALF).tolist())
        signatures[index] = sketch.hashvalues
        starts[index + 1] = starts[index] + len(shingles)
        sets.append(shingles)
    return Sets(np.concatenate([*sets, _NONE]), starts, signatures)


def _without(shingles: np.ndarray, common: np.ndarray) -> np.ndarray:
    if not len(common):
        return shingles
    places = np.minimum(np.searchsorted(common, shingles), len(common) - 1)
    rest = shingles[common[places] != shingles]
    return rest if len(rest) else shingles


def count_words(text: str) -> int:
    """Count the words of a text that are compared."""
    return len(_WORD.findall(text[:LONGEST]))


def hash_shingles(text: str) -> np.ndarray:
    """Return the sorted 64-bit hashes of a text's shingles; of a text under five words, one of all its words.

    Case, punctuation and white space do not count, but in a text that has nothing else.
    """
    text = text[:LONGEST].casefold()
    words = _WORD.findall(text)
    if len(words) < WORDS:
        whole = " ".join(words) or text.strip()
        digest = hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=8).digest()
        return np.frombuffer(digest, np.uint64)
    hashes = np.array([zlib.crc32(word.encode(errors="surrogatepass")) for word in words], np.uint64)
    ends = len(hashes) - WORDS + 1
    mixed = hashes[:ends].copy()
    for place in range(1, WORDS):
        mixed = mixed * _MULTIPLIER + hashes[place : place + ends]
    # Products carry upward alone: the high half would depend on all words, the low half hardly on the first.
    mixed = (mixed ^ (mixed >> _HALF)) * _MULTIPLIER
    return np.unique(mixed ^ (mixed >> _HALF))
