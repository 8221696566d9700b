"""The training rows of a recipe: of one source, or drawn from the sources of a mixture by their fractions."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from llmtune.errors import FieldError, one_line
from llmtune.recipe.data import Data, Source

_LONGEST_NAME = 300


def draw_places(data: Data, sources: np.ndarray, seed: int) -> np.ndarray:
    """Draw a mixture from rows of these sources: the places of its rows; all of them where there is one source."""
    if isinstance(data.train, str):
        return np.arange(len(sources))
    places = [np.flatnonzero(sources == part.source) for part in data.train]
    counts = [len(part) for part in places]
    check_counts(data.train, counts)
    drawn_of = draw(counts, [part.fraction for part in data.train], seed)
    return np.concatenate([part[kept] for part, kept in zip(places, drawn_of, strict=True)])


def draw(counts: Sequence[int], fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Draw rows from sources of `counts` rows: the indices, in order, that make the largest mixture without repeats.

    What a source gives depends on the seed and on how many it gives: neither on the other sources nor on their order,
    and the rows of a smaller draw are among those of a larger one.
    """
    return [drawn(count, size, seed) for count, size in zip(counts, sizes(counts, fractions), strict=True)]


def drawn(count: int, size: int, seed: int) -> np.ndarray:
    """Draw `size` of `count` rows without repeats: their indices, in order."""
    # RandomState, since a Generator's numbers may change between versions of numpy.
    order = np.argsort(np.random.RandomState(seed).random_sample(count), kind="stable")
    return np.sort(order[:size])


def sizes(counts: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """Return how many rows each source gives: the largest whole mixture at which none gives more than it has."""
    shares = _exact(fractions)
    total = _total(counts, shares)
    whole = [math.floor(total * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: whole[index] - total * shares[index])
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole


def check_counts(mixture: Sequence[Source], counts: Sequence[int]) -> None:
    """Raise FieldError for a source of a mixture that would give no row: it has none, or its fraction is too small."""
    for index, (part, count) in enumerate(zip(mixture, counts, strict=True)):
        if not count:
            message = f"eval or test has every row of {part.source}; none is left to draw"
            raise FieldError(f"data.train.{index}.source", message)
    fractions = [part.fraction for part in mixture]
    total = _total(counts, _exact(fractions))
    for index, size in enumerate(sizes(counts, fractions)):
        if not size:
            part = mixture[index]
            raise FieldError(
                f"data.train.{index}.fraction",
                f"{part.fraction:g} of a mixture of {total:,} rows is no row of {part.source}, which has "
                f"{counts[index]:,}; try {_rounded_up(1 / total)} or more",
            )


def describe_sources(
    data: Data, read_rows: Mapping[str, int], used: Mapping[str, int], trained: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Describe each source of a mixture: its fraction, rows, those that are used, and the tokens that train."""
    if isinstance(data.train, str):
        return []
    return [
        {
            **part.model_dump(),
            "rows": read_rows.get(part.source, 0),
            "used": used.get(part.source, 0),
            "tokens": trained.get(part.source, 0),
        }
        for part in data.train
    ]


def count_tokens(sources: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> dict[str, int]:
    """Count the tokens of examples by the source of their rows, which have the places `rows` among `sources`."""
    of_example = sources[rows]
    return {str(name): int(lengths[of_example == name].sum()) for name in dict.fromkeys(sources.tolist())}


def count_shared(sources: np.ndarray, digests: np.ndarray) -> int:
    """Count the rows, each with the digest of all of it, that are also a row of an earlier source of the mixture."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return int((sources != sources[first][inverse]).sum())


def source_notes(sources: Sequence[dict[str, Any]], shared: int) -> list[str]:
    """Tell what a mixture is made of, in one line, and how many of its rows are in two sources."""
    if not sources:
        return []
    parts = [
        f"{one['used']:,} of {one['rows']:,} rows of {one_line(one['source'], _LONGEST_NAME)} ({one['fraction']:.4g})"
        for one in sources
    ]
    lines = [f"mixture: {', '.join(parts)}"]
    return lines + ([f"{shared:,} rows of the mixture are also rows of an earlier source"] if shared else [])


def _exact(fractions: Sequence[float]) -> list[Fraction]:
    """Return the fractions as they are written, scaled so that they sum to 1."""
    written = [Fraction(repr(fraction)) for fraction in fractions]
    return [fraction / sum(written) for fraction in written]


def _total(counts: Sequence[int], shares: Sequence[Fraction]) -> int:
    return math.floor(min(count / share for count, share in zip(counts, shares, strict=True)))


def _rounded_up(value: float) -> str:
    """Write a number with two digits that is not below `value`: 0.00034."""
    unit = Fraction(10) ** (math.floor(math.log10(value)) - 1)
    return f"{float(math.ceil(Fraction(value) / unit) * unit):.2g}"
