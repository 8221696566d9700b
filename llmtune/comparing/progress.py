"""Shows how the entrants of a comparison get on, from what their workers keep."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

from llmtune.arms.record import ArmRecord
from llmtune.arms.results import arm_result
from llmtune.arms.scores import mean
from llmtune.arms.table import rates_words
from llmtune.comparing.folder import Folder
from llmtune.comparing.phase import phase_of, phases_words
from llmtune.comparing.request import Entrant
from llmtune.numbers import duration, number
from llmtune.working import working

POLL = 1.0
"""Seconds between two looks."""


@contextlib.contextmanager
def following(folder: Folder, entrants: Sequence[Entrant], place: str, seconds: float) -> Iterator[None]:
    """Show until the block ends what the entrants do and how far they are, and of `seconds` those that are left.

    `place` says which of all they are, as in 2 of 5. A line tells of each rate that was tried and each seed.
    """
    ended = threading.Event()
    name = f"{place} {' '.join(one.name for one in entrants)}".strip()
    phase = ""

    def words() -> str:
        return ", ".join(part for part in (name, phase) if part)

    def follow() -> None:
        nonlocal phase
        told = {one.name: _events(folder.record(one.name)) for one in entrants}
        with working(words, total=max(1.0, seconds), unit="s") as step:
            left = seconds
            while not ended.wait(POLL):
                phase = phases_words([phase_of(folder, one) for one in entrants])
                step(min(POLL, max(0.0, left)))  # what takes longer than its share has no time left
                left -= POLL
                for one in entrants:
                    events = _events(folder.record(one.name))
                    for line in events[len(told[one.name]) :]:
                        print(f"{one.name}: {line}", flush=True)
                    told[one.name] = events

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * POLL)


def _events(record: ArmRecord | None) -> list[str]:
    """A line for each rate that was tried and each seed that was trained, in order."""
    if record is None:
        return []
    lines = []
    for one in record.get("search", []):
        loss = f"validation loss {one['loss']:.4f}" if one["loss"] is not None else one.get("reason", one["state"])
        early = ", ended early" if one["state"] == "pruned" else ""
        lines.append(f"rate {rates_words(one['lr'])}: {loss} after {one['steps']} steps{early}")
    for seed in record.get("seeds", []):
        loss = f", validation loss {seed['curve'][-1]['loss']:.4f}" if seed["curve"] else ""
        lines.append(f"seed {seed['seed']}: {seed['steps']} steps in {duration(seed['seconds'])}{loss}")
    return lines


def result_line(record: ArmRecord, name: str, metric: str) -> str:
    """What an entrant came to, in one line."""
    if record["status"] != "done":
        return f"{name}: {record['status']}: {record.get('reason', '')}"
    result, seeds = arm_result(record, metric), len(record.get("seeds", []))
    value = mean(result.scores, None)["value"] if result else None
    score = "none" if value is None else number(value)
    told = f"{metric} {score} over {seeds} seed{'s' * (seeds > 1)}, rate {rates_words(record.get('lr'))}"
    return f"{name}: {told}, {duration(60 * record.get('minutes', 0.0))} in all"
