"""The boundary between a user's files and rows: a cursor that knows the place, and every failure there as one line."""

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass

from llmtune.errors import LlmtuneError, RecipeError, first_line


@dataclass
class Cursor:
    """Where a reader is in a source."""

    source: str
    line: int = 0
    """The line of a text file, the row of another source, both from 1; 0 before the first."""
    file: str = ""
    """The file of a folder, or of a pattern, that is read."""
    continues: str = ""
    """The place of the record before, where a document was cut between the two."""
    goes_on: bool = False
    """Whether the record's document goes on in the next one."""

    @property
    def where(self) -> str:
        """The place for messages: "train.jsonl:12"."""
        name = self.file or self.source
        return f"{name}:{self.line}" if self.line else name

    def enter(self, file: str) -> None:
        """Go to the start of another file of the source."""
        self.file, self.line, self.continues, self.goes_on = file, 0, "", False


@contextlib.contextmanager
def explained(at: Cursor) -> Iterator[None]:
    """Turn whatever is raised in the block into a RecipeError that names the cursor's place."""
    try:
        yield
    except LlmtuneError:
        raise
    except Exception as error:
        raise RecipeError(f"{at.where}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """Say in one line why something could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        hint = "; a JSON list is read from a file that ends in .json" if error.doc.strip() in ("[", "{") else ""
        return f"not JSON: {error.msg} at column {error.colno}{hint}"
    if isinstance(error, csv.Error):
        return f"not CSV: {error}"
    if isinstance(error, RecursionError):
        return "cannot be read: lists and objects are nested too deeply"
    if isinstance(error, MemoryError):
        return "cannot be read: it does not fit into memory"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return f"cannot be read: {reason}"
