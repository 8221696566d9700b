"""How long the runs that are left will take: by what the same run took before, else by its operations."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cells import Planned
from benchmarks.contest import Contest

STARTING = 18.0
"""Seconds of a process outside its steps."""
SHARE = 0.35
"""The share of the machine's GEMM rate that a tool reaches, until one was measured."""
OTHERS = 1.5
"""How much longer other tools take than llmtune, about."""


class Pace:
    """Learns from each run how fast this machine is, and says how long others will take."""

    def __init__(self, runs: Iterable[dict[str, Any]], rate: float) -> None:
        self._known: dict[tuple[str, ...], float] = {}
        self._operations = self._seconds = 0.0
        self._rate = SHARE * rate
        for run in runs:
            if "error" not in run:
                self._known[run["size"], run["rows"], run["arm"], run["tool"]] = run["wall_s"]

    def learn(self, planned: Planned, contest: Contest, wall: float) -> None:
        """Take the seconds of a run into account."""
        self._known[_place(planned)] = wall
        self._operations += _weighted(planned, contest)
        self._seconds += max(1.0, wall - STARTING)
        self._rate = self._operations / self._seconds

    def seconds(self, planned: Planned, contest: Contest) -> float:
        """The seconds that a run will take."""
        known = self._known.get(_place(planned))
        return STARTING + _weighted(planned, contest) / self._rate if known is None else known

    def left(self, runs: Sequence[tuple[Planned, Contest]]) -> float:
        """The seconds that all these runs will take."""
        return sum(self.seconds(planned, contest) for planned, contest in runs)


def _place(planned: Planned) -> tuple[str, ...]:
    return planned.cell.size, planned.cell.rows, planned.cell.arm, planned.tool


def _weighted(planned: Planned, contest: Contest) -> float:
    return contest.operations * (1 if planned.tool == "llmtune" else OTHERS)
