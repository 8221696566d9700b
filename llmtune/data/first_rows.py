"""The first rows of a recipe's sources, for what needs a few of them and can do without."""

import contextlib
import itertools

from llmtune.data.row import Row
from llmtune.data.rows import SPLITS, Form, iterate
from llmtune.errors import LlmtuneError
from llmtune.recipe.data import Data


def first_rows(data: Data, part: str, count: int) -> list[Row]:
    """Return at most `count` rows of each source of train, eval or test; none of a source that cannot be read."""
    return [row for one in data.sources(part) for row in _first(one.source, SPLITS[part], Form.of(data), count)]


def _first(source: str, split: str, form: Form, count: int) -> list[Row]:
    try:
        with contextlib.closing(iterate(source, split, form)) as rows:  # type: ignore[type-var]
            return list(itertools.islice(rows, count))
    except LlmtuneError:
        return []
