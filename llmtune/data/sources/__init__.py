"""Sources of rows: a source's name in, its records out, each with its place; a kind of source is one reader.

`records` is the only way in. A new kind of file is a reader, from a path and a cursor to records, and a line in
`files.READERS`.
"""

from llmtune.data.sources.cursor import Cursor, explained
from llmtune.data.sources.hub import HubName
from llmtune.data.sources.locate import is_file, problem, records, source_files

__all__ = ["Cursor", "HubName", "explained", "is_file", "problem", "records", "source_files"]
