"""The first rows of a recipe's sources, for what needs a few of them and can do without."""

import contextlib
import itertools
import json

from llmtune.data.row import Row, Tool
from llmtune.data.rows import SPLITS, Form, iterate
from llmtune.errors import LlmtuneError
from llmtune.recipe.data import Data

_READ_ROWS = 300
"""Rows of each held-out source that are read for their system prompt and tools."""


def first_rows(data: Data, part: str, count: int) -> list[Row]:
    """Return at most `count` rows of each source of train, eval or test; none of a source that cannot be read."""
    return [row for one in data.sources(part) for row in _first(one.source, SPLITS[part], Form.of(data), count)]


def shared_opening(data: Data) -> tuple[str | None, tuple[Tool, ...]]:
    """Return the system prompt and the tools that the first held-out conversations of each source share.

    Neither where they differ, or where no row can be read.
    """
    rows = [row for row in first_rows(data, data.held_out_part, _READ_ROWS) if row.messages]
    systems = {_system(row) for row in rows}
    tools = {json.dumps(row.tools): row.tools for row in rows}
    return systems.pop() if len(systems) == 1 else None, next(iter(tools.values())) if len(tools) == 1 else ()


def _system(row: Row) -> str | None:
    first = row.messages[0]
    return first["content"] if first["role"] == "system" else None


def _first(source: str, split: str, form: Form, count: int) -> list[Row]:
    try:
        with contextlib.closing(iterate(source, split, form)) as rows:  # type: ignore[type-var]
            return list(itertools.islice(rows, count))
    except LlmtuneError:
        return []
