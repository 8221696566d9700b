"""What a recipe depends on in a user's rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.advising.facts import count_labels, kind_of
from llmtune.data.row import Row
from llmtune.data.rows import guess_form, iterate
from llmtune.evaluation.held_out.choice import AnswerFacts, by_data

_TEXT_BYTES = 2400
"""Bytes of a plain text that a row of the default length holds."""


@dataclass(frozen=True)
class DataSummary:
    """What a recipe depends on in a user's data."""

    source: str
    rows: int
    turns: int
    longest: int
    """Estimated tokens of the longest row."""
    kind: str
    """What advice distinguishes: labels, json or text."""
    labels: int
    """Different answers, if they are labels; else 0."""
    form: str
    """The format of the rows, with its columns."""
    map: Mapping[str, str]
    """The map that names their columns; empty where they need none."""
    metrics: tuple[str, ...]
    """What answers such as these are scored by; nothing where the rows are plain texts."""


def summarize(source: str) -> DataSummary:
    """Read a source's rows once; raises RecipeError for a bad one."""
    form, count, size, turns = guess_form(source), 0, 0, 0
    name, facts = "", AnswerFacts()
    for row in iterate(source, form=form):
        count, size, turns = count + 1, max(size, _size(row)), max(turns, len(row.messages))
        name = row.form
        if row.messages:
            facts.add_row(row)
    metrics = by_data(facts, lambda: facts) if facts.rows else ()
    # Three bytes a token is on the safe side in most languages; the rest is what chat templates add.
    length, kind, labels = size // 3 + 32 + 8 * turns, kind_of(facts), count_labels(facts)
    return DataSummary(source, count, turns, length, kind, labels, name, form.map, metrics)


def _size(row: Row) -> int:
    """Bytes of a row's text, with its calls, thoughts and tools; of a plain text, those of a usual row."""
    if row.text is not None:
        return _TEXT_BYTES
    plain = all(len(message) == 2 for message in row.messages)
    texts = [message["content"] for message in row.messages] if plain else [json.dumps(row.messages)]
    return sum(len(text.encode()) for text in texts) + (len(json.dumps(row.tools)) if row.tools else 0)
