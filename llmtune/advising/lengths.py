"""How long the training rows are, counted on a sample of them."""

import numpy as np

from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.store.rows import StoredRows
from llmtune.errors import RecipeError
from llmtune.estimate.lengths import Lengths, counted, estimated
from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.recipe.data import Data

SAMPLE = 256
"""Rows that are tokenized."""


def sampled(rows: StoredRows, data: Data, base: Base) -> Lengths:
    """The lengths of `rows` by those of a sample, spread over all; the longest is never less than by characters.

    Where a row cannot be encoded, which `llmtune check` tells, lengths follow from characters.
    """
    by_characters = estimated(rows, data.max_length)
    places = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).round().astype(int)
    try:
        examples = encode([rows[int(place)] for place in places], load_tokenizer(base), stop_ids(base), Rules.of(data))
    except RecipeError:
        return by_characters
    if not len(examples.examples):
        return by_characters
    sample = counted(examples.examples)
    scale = len(rows) / len(places)
    longest = min(data.max_length, max(sample.longest, by_characters.longest))
    return Lengths(len(rows), longest, round(sample.tokens * scale), sample.supervised, counted=False)
