"""log.jsonl: one JSON object a step, read back without what a killed process left half written."""

import json
from pathlib import Path
from typing import Any

from llmtune.files import write_text

Record = dict[str, Any]


def read_log(log: Path) -> list[Record]:
    """The records of a log in order; a line that a killed process left half written is passed over."""
    if not log.exists():
        return []
    records = (_parse(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in records if record is not None]


def trim_log(log: Path, step: int, write: bool = True) -> list[Record]:
    """The records of a log up to and with `step`; the file is cut down to them where `write` says so."""
    kept = [record for record in read_log(log) if record["step"] <= step]
    if write:
        write_text(log, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return kept


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
