"""What is compared: the text of a row, of its questions, and of the documents of an evaluation suite."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from llmtune.data.near.duplicates import MOST_ROWS
from llmtune.data.near.shingles import count_words
from llmtune.data.row import Message, Row
from llmtune.data.sources import Cursor, explained, records
from llmtune.errors import LlmtuneError
from llmtune.recipe.suite import HELD_OUT, LocalTask, Suite, local_rows

Text = tuple[str, str]
"""An id and a text."""


class RowTexts(Sequence[Text]):
    """The ids and texts of rows, each read when it is asked for; with `questions`, of the user's turns alone."""

    def __init__(self, rows: Sequence[Row], questions: bool = False) -> None:
        self.rows, self.questions = rows, questions

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> "RowTexts": ...
    def __getitem__(self, index: int | slice) -> "Text | RowTexts":
        if isinstance(index, slice):
            return RowTexts(self.rows[index], self.questions)
        row = self.rows[index]
        turns = [turn for turn in row.messages if turn["role"] == "user" or not self.questions]
        return row.id, "\n".join([*map(_content, turns), *([row.text] if row.text else [])])


@dataclass(frozen=True)
class Documents:
    """The texts of a suite's documents, and its tasks whose documents are not at hand."""

    texts: list[Text] = field(default_factory=list)
    not_at_hand: list[str] = field(default_factory=list)


def suite_documents(suite: Suite | None) -> Documents:
    """Read the documents of a suite's local tasks: what a task of lm-eval would fetch is not asked for."""
    documents = Documents()
    for entry in suite.tasks if suite else ():
        if isinstance(entry, LocalTask):
            assert suite is not None
            documents.texts.extend(_task_texts(str(local_rows(suite, entry)), entry.task))
        elif entry != HELD_OUT:
            documents.not_at_hand.append(entry)
    return documents


def _task_texts(file: str, task: str) -> Iterator[Text]:
    """Yield the texts of five words and more in a local task's rows; what cannot be read, lm-eval tells of later."""
    at = Cursor(file)
    try:
        with explained(at):
            for record in itertools.islice(records(at, "train"), MOST_ROWS):
                parts = list(_strings(record))
                whole = ["\n".join(parts)] if len(parts) > 1 else []
                yield from ((f"{task}:{at.line}", text) for text in [*parts, *whole] if count_words(text) >= 5)
    except LlmtuneError:
        return


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _content(turn: Message) -> str:
    """The text of a turn: reasoning, content and tool calls."""
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else None
    return "\n".join(filter(None, [turn.get("reasoning_content"), turn.get("content"), calls]))
