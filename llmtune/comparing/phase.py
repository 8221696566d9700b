"""What an entrant does now, from what its worker keeps in its folder."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.arms.record import ArmRecord
from llmtune.comparing.budget import MOST_TRIALS
from llmtune.comparing.folder import Folder
from llmtune.comparing.request import Entrant
from llmtune.errors import LlmtuneError
from llmtune.run import Run

_TAIL = 4096
"""Bytes at the end of a log in which its last step stands."""


@dataclass(frozen=True)
class Phase:
    """What an entrant does: the kind of work, and how far it is."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return ", ".join(word for word in (self.kind, self.detail) if word)


def phase_of(folder: Folder, entrant: Entrant) -> Phase:
    """What an entrant does at this moment; starting where its worker has left nothing yet."""
    record, home = folder.record(entrant.name), folder.arm(entrant.name)
    if record is None:
        return Phase("starting")
    if record["status"] != "running":
        return Phase(record["status"])
    trial = next(iter(home.glob(".trial-*")), None)
    if trial is not None:
        return _trial(record, home, trial)
    return _seed(folder, record, home) if "lr" in record else Phase("starting")


def phases_words(phases: Sequence[Phase]) -> str:
    """What one entrant does, with how far it is; how many of several do what."""
    if len(phases) == 1:
        return str(phases[0])
    return ", ".join(f"{number} {kind}" for kind, number in Counter(phase.kind for phase in phases).items())


def _trial(record: ArmRecord, home: Path, trial: Path) -> Phase:
    if "lr" in record or not (home / "study.db").exists():
        return Phase("measuring its pace")
    number = min(len(record.get("search", [])) + 1, MOST_TRIALS)
    step = _last_step(trial / "run" / "log.jsonl")
    of = f"trial {number} of at most {MOST_TRIALS}"
    return Phase("searching the rate", f"{of}, step {step}" if step else of)


def _seed(folder: Folder, record: ArmRecord, home: Path) -> Phase:
    number = int(folder.head()["recipe"]["train"]["seed"]) + len(record.get("seeds", []))
    run, seed = Run(home / f"seed-{number}"), f"seed {number}"
    with contextlib.suppress(LlmtuneError, OSError):
        if run.path.is_dir() and run.done("train"):
            return Phase("evaluating", seed)
    step, steps = _last_step(run.log_file), record.get("steps")
    return Phase("training", f"{seed}, step {step} of {steps}" if step and steps else seed)


def _last_step(log: Path) -> int | None:
    """The step of a log's last whole line; None before there is one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return None
