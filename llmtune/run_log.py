"""log.jsonl: one JSON object per step, read back without the half line that a killed process may leave."""

import json
from pathlib import Path
from typing import Any

from llmtune.files import write_text

Record = dict[str, Any]


def read_log(log: Path) -> list[Record]:
    """The records of a log in order, without lines that a killed process left incomplete."""
    if not log.exists():
        return []
    records = (_parse(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if record is not None]


def trim_log(log: Path, step: int, write: bool = True) -> list[Record]:
    """The records of a log up to and including `step`; with `write`, the file is cut to them."""
    records = [record for record in read_log(log) if record["step"] <= step]
    if write:
        write_text(log, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return records


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
