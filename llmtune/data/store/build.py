"""Encodes rows once: in this process where they are few, else on all cores into the cache, where others find them."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmtune import data
from llmtune.data.encoding.dates import writes_day
from llmtune.data.encoding.encode import Encoded
from llmtune.data.store.batches import SPECIAL, Job, encode_batch, find_parts, read_part, write_part
from llmtune.data.store.encoded import SCHEMA, EncodedRows, Summary, add_summary, notes_of, summary_of
from llmtune.data.store.entries import Entry, StoredTable, cache_root, check_room, explained
from llmtune.data.store.pool import Batch, NoStartError, encode_in_processes, processes_for
from llmtune.data.store.rows import StoredRows, are_few
from llmtune.data.store.worker import INDICES, JOB, TOKENIZER
from llmtune.files import as_json, digest_of_files, write_json
from llmtune.working import working

ROWS_PER_PROCESS = 10_000
"""Rows that pay for the seconds that a process takes to start."""
GROWTH = 3
"""Bytes of disk for each byte of text that is encoded, at most, for the parts and the table made of them."""
_COMPARED = 4
"""Rows that this process encodes too, to compare."""


@dataclass(frozen=True)
class EncodedPart:
    """The encoded rows of train or eval, and what was noted of them."""

    examples: EncodedRows
    notes: Encoded
    """What is known beside the examples, which are not in it."""
    special: list[str]
    """Ids of rows with special tokens in their text."""


def encode_rows(rows: StoredRows, job: Job) -> EncodedPart:
    """Encode and check rows, or take what an earlier run or another process encoded; raises as `encode_batch`."""
    if rows.stored.file is None or are_few(len(rows), rows.size):
        return _part(_in_memory(rows, job))
    with tempfile.TemporaryDirectory(prefix="llmtune-encode-") as name:
        folder = Path(name)
        job.tokenizer.save_pretrained(folder / TOKENIZER)
        entry = Entry("encoded", _facts(rows, job, folder / TOKENIZER))
        stored = entry.open()
        if stored is None:
            with entry.locked():
                stored = entry.open() or _encode(entry, rows, job, folder)
        return _part(stored)


@cache
def code_digest() -> str:
    """The digest of the code that reads and encodes rows."""
    return digest_of_files(Path(data.__file__).parent, "*.py")


def _facts(rows: StoredRows, job: Job, tokenizer: Path) -> dict[str, object]:
    """All that the encoded rows depend on."""
    return {
        "rows": rows.stored.sha256,
        "chosen": hashlib.sha256(np.ascontiguousarray(rows.indices, np.int64).tobytes()).hexdigest(),
        "job": as_json(job.to_json()),
        "tokenizer": digest_of_files(tokenizer, "*"),
        "code": code_digest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "day": date.today().isoformat() if writes_day(job.tokenizer.chat_template, job.rules.template) else "",
    }


def _part(stored: StoredTable) -> EncodedPart:
    return EncodedPart(EncodedRows(stored.table), notes_of(stored.summary), stored.summary.get(SPECIAL, []))


def _in_memory(rows: StoredRows, job: Job) -> StoredTable:
    summary: Summary = {}
    batches = list[pa.RecordBatch]()
    for start, end in rows.batches():
        table = encode_batch(rows[start:end], start, job)
        add_summary(summary, summary_of(table))
        batches += table.replace_schema_metadata().to_batches()
    return StoredTable(pa.Table.from_batches(batches, SCHEMA), summary)


def _encode(entry: Entry, rows: StoredRows, job: Job, folder: Path) -> StoredTable:
    """Encode what no killed process left finished, and make the entry of all parts."""
    root = cache_root()
    with explained(root):
        entry.parts.mkdir(exist_ok=True)
        parts = find_parts(entry.parts)
        batches = [(number, *places) for number, places in enumerate(rows.batches())]
        missing = [batch for batch in batches if batch[0] not in parts]
        check_room(root, GROWTH * rows.size * len(missing) // len(batches), "the encoded rows")
        with working("encoding the rows", len(rows), "rows") as step:
            step(sum(end - start for number, start, end in batches if number in parts))
            for (number, start, end), file in _run(entry, missing, rows, job, folder):
                parts[number] = file
                step(end - start)
        summary: Summary = {}
        with entry.writing(SCHEMA, summary) as write:
            for number in sorted(parts):
                table = read_part(parts[number])
                add_summary(summary, summary_of(table))
                for batch in table.replace_schema_metadata().to_batches():
                    write(batch)
    return entry.reopen()


def _run(entry: Entry, missing: list[Batch], rows: StoredRows, job: Job, folder: Path) -> Iterator[tuple[Batch, Path]]:
    """Encode batches on all cores where they are many and other processes encode as this one does, else here."""
    done = set[Batch]()
    count = processes_for(sum(end - start for _, start, end in missing), ROWS_PER_PROCESS)
    if count > 1 and _is_plain(job):
        np.save(folder / INDICES, rows.indices)
        values = {"job": job.to_json(), "rows": str(rows.stored.file), "parts": str(entry.parts)}
        write_json(folder / JOB, values)
        try:
            with closing(encode_in_processes(missing, folder, count)) as finished:
                for batch, file in finished:
                    if not done and not _agrees(file, batch, rows, job):
                        break
                    done.add(batch)
                    yield batch, file
        except NoStartError:
            pass
        _remove_parts(entry, {number for number, *_ in missing} - {number for number, *_ in done})
    for number, start, end in (batch for batch in missing if batch not in done):
        yield (number, start, end), write_part(encode_batch(rows[start:end], start, job), entry.parts, number)


def _remove_parts(entry: Entry, numbers: set[int]) -> None:
    """Remove the parts with these numbers: processes that encode otherwise may have written some."""
    for file in entry.parts.glob("*.arrow") if numbers else ():
        if int(file.stem.partition("-")[0]) in numbers:
            file.unlink()


def _is_plain(job: Job) -> bool:
    """Whether another process can be told of a job in JSON."""
    values = job.to_json()
    try:
        return bool(json.loads(json.dumps(values)) == values)
    except TypeError:
        return False


def _agrees(file: Path, batch: Batch, rows: StoredRows, job: Job) -> bool:
    """Whether another process, with a copy of the tokenizer, encoded the first rows of a batch as this one does."""
    _, start, end = batch
    ours = encode_batch(rows[start : min(end, start + _COMPARED)], start, job).replace_schema_metadata()
    theirs = read_part(file).replace_schema_metadata()
    return bool(theirs.slice(0, ours.num_rows).equals(ours))
