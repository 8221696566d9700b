"""The list of kinds of files: each ending of a name, and the reader that gives the records of such a file."""

from llmtune.data.sources.columnar import columnar
from llmtune.data.sources.text_files import Reader, json_lines, json_list, plain_text, table
from llmtune.data.sources.unpacking import PACKINGS

_TEXT_FILES: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": table(","),
    ".tsv": table("\t"),
    ".txt": plain_text,
}
READERS: dict[str, Reader] = {
    **_TEXT_FILES,
    **{ending + packing: reader for ending, reader in _TEXT_FILES.items() for packing in PACKINGS},
    ".parquet": columnar("parquet", "a Parquet file", batch_size=1000),  # else it fails where there are no rows
    ".arrow": columnar("arrow", "an Arrow file"),
}
"""The reader of each ending of a file's name."""
ENDINGS = f"{', '.join(_TEXT_FILES)} (each also with {' or '.join(PACKINGS)}), .parquet or .arrow"
"""What a file's name may end in, for people."""


def reader_of(name: str) -> Reader | None:
    """Return the reader of a file by its name, None for a kind that none takes."""
    lower = name.lower()
    return next((reader for ending, reader in READERS.items() if lower.endswith(ending)), None)
