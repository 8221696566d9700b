"""The training rows of a recipe: of one source, or drawn from the sources of a mixture by their fractions."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.data.rows import Form, read
from llmtune.errors import FieldError, one_line
from llmtune.recipe.data import Data, Source

_LONGEST_NAME = 300


def training_rows(data: Data, seed: int) -> list[Row]:
    """Read the training rows of a recipe's data section, drawn by `seed` where it names a mixture.

    Raises RecipeError at the first bad row, FieldError for fractions that the rows cannot have.
    """
    return draw_rows(data, read_training(data), seed)


def read_training(data: Data) -> list[Row]:
    """Read all rows of the sources of data.train; of a mixture, each with its source. Raises RecipeError."""
    form, parts = Form.of(data), data.sources("train")
    if isinstance(data.train, str):
        return read(data.train, "train", form)
    return [replace(row, source=part.source) for part in parts for row in read(part.source, "train", form)]


def draw_rows(data: Data, rows: list[Row], seed: int) -> list[Row]:
    """Draw a mixture from the rows of its sources, in their order; the rows of a single source stay as they are."""
    if isinstance(data.train, str):
        return rows
    parts = [[row for row in rows if row.source == part.source] for part in data.train]
    counts = [len(part) for part in parts]
    check_counts(data.train, counts)
    kept = draw(counts, [part.fraction for part in data.train], seed)
    return [part[index] for part, indices in zip(parts, kept, strict=True) for index in indices]


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
    given = [math.floor(total * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: given[index] - total * shares[index])
    for index in by_remainder[: total - sum(given)]:
        given[index] += 1
    return given


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
    data: Data, read_rows: Iterable[Row], used: Iterable[Row], trained: dict[str, int]
) -> list[dict[str, Any]]:
    """Describe each source of a mixture: its fraction, rows, those that are used, and the tokens that train."""
    if isinstance(data.train, str):
        return []
    rows, drawn_rows = _count(read_rows), _count(used)
    return [
        {
            **part.model_dump(),
            "rows": rows[part.source],
            "used": drawn_rows[part.source],
            "tokens": trained.get(part.source, 0),
        }
        for part in data.train
    ]


def count_tokens(rows: Iterable[Row], examples: Iterable[Example]) -> dict[str, int]:
    """Count the tokens of the examples by the source of their rows."""
    sources = {row.where: row.source for row in rows}
    tokens: dict[str, int] = defaultdict(int)
    for example in examples:
        tokens[sources.get(example.where, "")] += len(example.input_ids)
    return dict(tokens)


def count_shared(rows: Iterable[Row]) -> int:
    """Count the rows that are also, exactly so, a row of an earlier source of the mixture."""
    first: dict[bytes, str] = {}
    digests = ((row, hashlib.blake2b(_content(row), digest_size=16).digest()) for row in rows)
    return sum(first.setdefault(digest, row.source) != row.source for row, digest in digests)


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


def _content(row: Row) -> bytes:
    return json.dumps([row.messages, row.tools, row.text]).encode()


def _count(rows: Iterable[Row]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.source] += 1
    return counts


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
