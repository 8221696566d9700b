"""Encodes one batch of rows: a pure function of the rows and the job, so that any process may do it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llmtune.data.checks import check_bos, check_ids, check_stop, is_learned, with_special_tokens
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.data.store.encoded import places_of_rows, summarize, to_batch, with_summary

SPECIAL = "special_tokens"
"""Ids of rows with special tokens in their text."""


@dataclass(frozen=True)
class Job:
    """How rows are encoded and checked."""

    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    rules: Rules
    vocabulary: int | None
    """The rows of the model's embeddings."""

    def to_json(self) -> dict[str, Any]:
        """All but the tokenizer, as plain values."""
        rules = asdict(self.rules) | {"template": dict(self.rules.template)}
        return {"stop": sorted(self.stop), "rules": rules, "vocabulary": self.vocabulary}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> "Job":
        """The job of a tokenizer that `to_json` gave these values."""
        return cls(tokenizer, frozenset(values["stop"]), Rules(**values["rules"]), values["vocabulary"])


def encode_batch(rows: Sequence[Row], first: int, job: Job) -> pa.Table:
    """Encode and check rows, of which the first has the place `first`; raises RecipeError for the first bad one."""
    encoded = encode(list(rows), job.tokenizer, set(job.stop), job.rules)
    # Examples with nothing to learn are counted over all rows, and then refused.
    check_stop((example for example in encoded.examples if is_learned(example)), set(job.stop))
    check_bos(encoded.examples, job.tokenizer)
    check_ids(encoded.examples, job.tokenizer, job.vocabulary)
    special = {SPECIAL: with_special_tokens(rows, job.tokenizer)}
    places = [first + place for place in places_of_rows([row.where for row in rows], encoded)]
    return with_summary(to_batch(encoded, places), summarize(encoded, **special))


def write_part(table: pa.Table, folder: Path, number: int) -> Path:
    """Write an encoded batch to a file that is complete or absent, and whose name holds its digest."""
    partial = folder / f"{number:07}.partial"
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return partial.replace(folder / f"{number:07}-{_digest(partial)}.arrow")


def find_parts(folder: Path) -> dict[int, Path]:
    """The finished batches in a folder, by number; those that are damaged are removed."""
    parts = {}
    for file in sorted(folder.glob("*")):
        number, _, digest = file.stem.partition("-")
        if file.suffix == ".arrow" and number.isdigit() and _digest(file) == digest:
            parts[int(number)] = file
        else:
            file.unlink()
    return parts


def read_part(file: Path) -> pa.Table:
    """The encoded batch in a file."""
    with pa.OSFile(str(file), "rb") as source:
        return pa.ipc.open_file(source).read_all()


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
