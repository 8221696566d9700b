"""What a recipe depends on in a user's rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.data.row import Row
from llmtune.data.rows import guess_form, iterate
from llmtune.evaluation.held_out.choice import JSON, AnswerFacts, by_data

_LONGEST_LABEL = 60
"""Characters of an answer that may be a label."""
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
    labels: int
    """Different answers, if they repeat like labels; else 0."""
    form: str
    """The format of the rows, with its columns."""
    map: Mapping[str, str]
    """The map that names their columns; empty where they need none."""
    metrics: tuple[str, ...]
    """What answers such as these are scored by; nothing where the rows are plain texts."""

    @property
    def kind(self) -> str:
        """What advice distinguishes: labels, json or text."""
        return "json" if JSON in self.metrics else "labels" if self.labels else "text"


def summarize(source: str) -> DataSummary:
    """Read a source's rows once; raises RecipeError for a bad one."""
    form, count, size, turns = guess_form(source), 0, 0, 0
    answers, longest_answer, name, facts = set[str](), 0, "", AnswerFacts()
    for row in iterate(source, form=form):
        count, size, turns = count + 1, max(size, _size(row)), max(turns, len(row.messages))
        longest_answer, name = max(longest_answer, len(row.answer)), row.form
        if longest_answer <= _LONGEST_LABEL:
            answers.add(row.answer)
        if row.messages:
            facts.add_row(row)
    labels = len(answers) if longest_answer <= _LONGEST_LABEL and len(answers) <= count / 5 else 0
    metrics = by_data(facts, lambda: facts) if facts.rows else ()
    # Three bytes a token is on the safe side in most languages; the rest is what chat templates add.
    return DataSummary(source, count, turns, size // 3 + 32 + 8 * turns, labels, name, form.map, metrics)


def _size(row: Row) -> int:
    """Bytes of a row's text, with its calls, thoughts and tools; of a plain text, those of a usual row."""
    if row.text is not None:
        return _TEXT_BYTES
    plain = all(len(message) == 2 for message in row.messages)
    texts = [message["content"] for message in row.messages] if plain else [json.dumps(row.messages)]
    return sum(len(text.encode()) for text in texts) + (len(json.dumps(row.tools)) if row.tools else 0)
