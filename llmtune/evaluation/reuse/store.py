"""Answers that were kept in the cache: a file each, named after all that decides it, complete or absent."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.files import cache_folder, digest_of, read_json, remove_unused, write_text

LIMIT = 2**29
"""Bytes that kept answers may take; those that were not read for longest go first."""


@dataclass(frozen=True)
class Kept:
    """Answers that were kept: as JSON holds them, the seconds that they took, and the time at which they were given."""

    answers: Any
    seconds: float
    given: str


def recall(facts: Mapping[str, object]) -> Kept | None:
    """Return the answers that these facts decide; None where they are absent or damaged."""
    try:
        file = _file(facts)
        stored = read_json(file)
        if stored["facts"] != facts or digest_of(stored["answers"]) != stored["sha256"]:
            return None
        kept = Kept(stored["answers"], float(stored["seconds"]), str(stored["given"]))
        os.utime(file)
    except (LlmtuneError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return kept


def keep(facts: Mapping[str, object], answers: object, seconds: float) -> None:
    """Keep answers under the facts that decide them; where the cache cannot be written, that costs only time."""
    given = datetime.now().astimezone().isoformat(" ", "minutes")[:16]
    stored = {"facts": facts, "seconds": seconds, "given": given, "sha256": digest_of(answers), "answers": answers}
    with contextlib.suppress(OSError, LlmtuneError):
        file = _file(facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)  # they hold the text of rows
        write_text(file, json.dumps(stored, ensure_ascii=False))
        remove_unused(file.parent.glob("*"), LIMIT, [file])


def _file(facts: Mapping[str, object]) -> Path:
    return cache_folder() / "answers" / f"{digest_of(dict(facts))[:32]}.json"
