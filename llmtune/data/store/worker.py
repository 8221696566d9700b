"""Encodes the batches whose numbers stand in the input of this process, by what lies in the folder that it is told.

It answers each with a line of JSON. It ends when its input does, at once: whoever started it is gone then.
"""

import json
import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from llmtune.data.store.batches import Job, encode_batch, write_part
from llmtune.data.store.entries import StoredTable, map_table
from llmtune.data.store.rows import StoredRows
from llmtune.errors import FieldError, LlmtuneError, first_line
from llmtune.files import read_json

JOB, INDICES, TOKENIZER = "job.json", "indices.npy", "tokenizer"


def main() -> None:
    """Encode batches until the input ends."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    tasks: SimpleQueue[list[int]] = SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    values = read_json(folder / JOB)
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False, local_files_only=True)
    job = Job.of(tokenizer, values["job"])
    rows = StoredRows(StoredTable(map_table(Path(values["rows"])), {}), np.load(folder / INDICES, allow_pickle=False))
    while True:
        number, start, end = tasks.get()
        print(json.dumps(_answer(rows, job, Path(values["parts"]), number, start, end)), file=answers, flush=True)


def _read(tasks: "SimpleQueue[list[int]]") -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)


def _answer(rows: StoredRows, job: Job, parts: Path, number: int, start: int, end: int) -> dict[str, Any]:
    """Encode one batch; what it failed with is the answer then."""
    try:
        return {"part": str(write_part(encode_batch(rows[start:end], start, job), parts, number))}
    except FieldError as error:
        return {"key": error.key, "message": error.message, "kind": error.kind.__name__}
    except LlmtuneError as error:
        return {"message": str(error), "kind": type(error).__name__}
    except OSError as error:
        return {"errno": error.errno or 0, "message": error.strerror or str(error), "file": str(error.filename or "")}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {first_line(error)}"}
