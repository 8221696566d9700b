"""Answers as they come: a file of JSON lines that an interrupted command goes on with, and no other one."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.answering.batches import Ask
from llmtune.errors import MachineError, RecipeError

_MARK = "llmtune infer"
"""The key of the first line; its value is the settings that made the answers."""


class Answer(NamedTuple):
    """An answer of a model."""

    text: str
    tokens: int


class Journal:
    """The answers that are there, by model and what was asked."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file
        self.answers: dict[str, dict[Ask, Answer]] = {}
        self.is_ours = False
        """Whether it is one of these very answers: `begin` has said so."""

    def of(self, model: str) -> dict[Ask, Answer]:
        """The answers of a model."""
        return self.answers.setdefault(model, {})

    def add(self, model: str, answers: Mapping[Ask, Answer]) -> None:
        """Write some answers of a model; they are on disk when this returns."""
        lines = [
            json.dumps({"model": model, "row": ask.row, "sample": ask.sample, "text": one.text, "tokens": one.tokens})
            for ask, one in answers.items()
        ]
        self._write("".join(f"{line}\n" for line in lines))
        self.of(model).update(answers)

    def begin(self, settings: Mapping[str, Any], afresh: bool = False) -> None:
        """Read what an earlier command left, or write the settings; `afresh` drops what is there.

        Raises RecipeError for a file that is not ours, is damaged, or was made under other settings.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if content and not content.startswith(f'{{"{_MARK}"'.encode()):
            raise RecipeError(f"{self.path}: was not written by llmtune infer; remove it, or give another -o")
        whole = b"" if afresh else whole
        self._file.truncate(len(whole))  # a line that a killed command left half-written
        if not whole:
            self.is_ours = True
            self._write(json.dumps({_MARK: settings}) + "\n")
            return
        try:
            first, *lines = whole.decode().splitlines()
            before = json.loads(first)[_MARK]
            refuse_other_settings(self.path, before, settings)
            for line in lines:
                one = json.loads(line)
                self.of(one["model"])[Ask(one["row"], one["sample"])] = Answer(one["text"], one["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{self.path}: is damaged; start again with --overwrite") from error
        self.is_ours = True

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


@contextlib.contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open a journal, which no other process may have open; one that holds no answer in the end is removed.

    Raises RecipeError where one has, MachineError where its folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise MachineError(f"{path.parent}: cannot be written to: {error.strerror}; give another -o") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                message = f"{path}: another llmtune process writes to it; wait, or give another -o"
                raise RecipeError(message) from error
        journal = Journal(path, file)
        try:
            yield journal
        finally:
            if not any(journal.answers.values()) and (journal.is_ours or not path.stat().st_size):
                path.unlink()


def refuse_other_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RecipeError where answers were made under other settings than those of now, naming the first that differs.

    What `rows`, `delta` and the like hold is a digest or long; such a setting is named alone.
    """
    for name in now:
        if before.get(name) == now[name]:
            continue
        values = (before.get(name), now[name])
        change = f"{name} {_shown(values[0])} there, {_shown(values[1])} here"
        short = all(isinstance(value, str | int | float | None) and len(str(value)) <= 40 for value in values)
        what = change if short else f"other {name}"
        raise RecipeError(f"{path}: holds answers of other settings ({what}); give another -o, or --overwrite it")


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)
