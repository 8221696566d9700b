"""What is compared: the text of a row, of its questions, and of the documents of an evaluation suite."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from llmtune.data.near.duplicates import MOST_ROWS
from llmtune.data.near.shingles import count_words
from llmtune.data.row import Message, Row
from llmtune.data.sources import Cursor, explained, records
from llmtune.errors import LlmtuneError
from llmtune.files import shipped_folder
from llmtune.recipe.located_yaml import load_yaml
from llmtune.recipe.suite import HELD_OUT, LocalTask, Suite, local_rows, row_files, task_file

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
    """Read the documents of a suite's tasks on local files: what a task of lm-eval would fetch is not asked for."""
    documents = Documents()
    for entry in suite.tasks if suite else ():
        if entry == HELD_OUT:
            continue
        assert suite is not None
        name = entry.task if isinstance(entry, LocalTask) else entry
        local = row_files(local_rows(suite, entry)) if isinstance(entry, LocalTask) else None
        files = _files(task_file(suite, name)) if local is None else [*local.values()]
        for file in files:
            documents.texts.extend(_task_texts(str(file), name))
        if not files:
            documents.not_at_hand.append(name)
    return documents


def _files(task: Path | None) -> list[Path]:
    """Return the local files of the questions that a task's file names, from this folder or beside llmtune."""
    if task is None:
        return []
    config = load_yaml(task).value
    options = config.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, dict) else None
    if not isinstance(files, dict):
        return []
    listed = [files.get(config.get(split)) for split in ("test_split", "validation_split")]
    names = [name for name in listed if isinstance(name, str)]
    places = (folder / name for name in names for folder in (Path(), shipped_folder("sample").parents[1]))
    return [place for place in places if place.is_file()][:1]


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
