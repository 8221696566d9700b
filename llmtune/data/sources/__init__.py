"""Sources of rows: a source's name in, its records out, each with its place; a kind of source is one reader.

`records` is the only way in. A new kind of file is a function in `files.READERS`, from a path and a cursor to records.
"""

from llmtune.data.sources.cursor import Cursor, explained
from llmtune.data.sources.locate import is_file, problem, records

__all__ = ["Cursor", "explained", "is_file", "problem", "records"]
