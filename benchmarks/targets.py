"""What llmtune is to reach beside the fastest and the leanest other tool, and whether it does."""

from collections.abc import Sequence
from typing import Any

TIMES = {
    "lora": {"135M/80": 1.5, "135M/437": 1.5, "135M/947": 1.4, "1.07B/80": 1.4},
    "full": {"135M/80": 1.6, "135M/437": 1.5, "135M/947": 1.4},
    "frozen": {"135M/80": 1.8, "135M/437": 1.6, "135M/947": 1.5, "1.07B/80": 1.4},
    "frozen-3": {"135M/80": 3.0, "135M/437": 2.6, "135M/947": 2.4, "1.07B/80": 2.4},
}
"""How many times faster, a step and as a whole process, by arm, and by size and mean tokens of a row."""
MEMORY = {"lora": 0.55, "full": 0.75, "frozen": 0.6, "frozen-3": 0.6}
"""The share of the memory of the leanest other tool, at most."""
Rows = Sequence[dict[str, Any]]


def judge(rows: Rows) -> list[list[str]]:
    """The cells of the table of targets, a row for each arm and shape that has one."""
    return [
        [arm, shape, *_measured([row for row in rows if (row["arm"], f"{row['size']}/{row['rows']}") == (arm, shape)])]
        for arm, shapes in TIMES.items()
        for shape in shapes
    ]


def _measured(rows: Rows) -> list[str]:
    others = [row for row in rows if row["tool"] != "llmtune" and "times_step" in row]
    if not others:
        return ["not measured"] * 3
    arm, shape = others[0]["arm"], f"{others[0]['size']}/{others[0]['rows']}"
    goal = TIMES[arm][shape]
    step, wall, lean = (
        min(others, key=lambda row: row[name]) for name in ("seconds_per_step", "wall_s", "peak_rss_mb")
    )
    return [
        _against(step, "times_step", goal, step["times_step"] >= goal),
        _against(wall, "times_wall", goal, wall["times_wall"] >= goal),
        _against(lean, "memory", MEMORY[arm], lean["memory"] <= MEMORY[arm]),
    ]


def _against(row: dict[str, Any], name: str, goal: float, reached: bool) -> str:
    return f"{row[name]:.2f} of {goal}: {'hit' if reached else '**miss**'} ({row['tool']})"
