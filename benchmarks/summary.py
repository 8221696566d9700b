"""The runs of a machine by cell and tool: medians, how each tool stands beside llmtune, and what is WRONG."""

import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from benchmarks.arms import GRADUAL

MEDIANS = (
    "seconds_per_step",
    "tokens_per_s",
    "wall_s",
    "cpu_s",
    "peak_rss_mb",
    "first_loss",
    "last_loss",
    "utilization",
)
FIRST_LOSS = {"bf16": 1e-2, "fp32": 1e-3}
"""How far the first loss of a tool may be from llmtune's, relative, by precision: before it, no weight has changed."""
NEXT_LOSSES, NEXT = 2e-2, 3
"""How far those of the next steps may be, up to this one: LoRA starts from other numbers in each tool."""
APART = timedelta(minutes=20)
"""How far apart the ends of two runs may be that are compared: the speed of a shared machine changes."""
Runs = Sequence[dict[str, Any]]


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """Make one row per cell and tool, in the order of the runs; llmtune's first in its cell."""
    groups = dict.fromkeys((run["size"], run["rows"], run["arm"], run["tool"]) for run in runs)
    cells = list(dict.fromkeys(group[:3] for group in groups))
    ordered = sorted(groups, key=lambda group: (cells.index(group[:3]), group[3] != "llmtune"))
    return [_row(group, [run for run in runs if _group(run) == group], runs) for group in ordered]


def _group(run: dict[str, Any]) -> tuple[str, str, str, str]:
    return run["size"], run["rows"], run["arm"], run["tool"]


def _row(group: tuple[str, ...], same: Runs, runs: Runs) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(("size", "rows", "arm", "tool"), group, strict=True))
    good = [run for run in same if "error" not in run]
    errors = [run["error"] for run in same if "error" in run]
    row |= {"runs": len(good), "failed": len(errors), "error": errors[-1] if errors else ""}
    if not good:
        return row
    row |= {name: statistics.median(run[name] for run in good) for name in MEDIANS}
    row |= {f"{name}_spread": spread(run[name] for run in good) for name in ("seconds_per_step", "wall_s")}
    row["frozen_blocks"] = good[-1].get("frozen_blocks", "")
    pairs = paired(good, runs)
    wrong = next(filter(None, (fault(theirs, ours) for theirs, ours in pairs)), None)
    if wrong:
        return row | {"wrong": wrong}
    return row | ({name: statistics.median(map(ratio, pairs)) for name, ratio in RATIOS.items()} if pairs else {})


def spread(values: Any) -> float:
    """The largest minus the smallest value."""
    listed = list(values)
    return max(listed) - min(listed)


def paired(runs: Runs, others: Runs) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each run beside llmtune's of the same cell and repeat, where that ended well and not long before or after."""
    ours = {(_group(run)[:3], run["repeat"]): run for run in others if run["tool"] == "llmtune" and "error" not in run}
    keys = [(_group(run)[:3], run["repeat"]) for run in runs]
    return [(run, ours[key]) for run, key in zip(runs, keys, strict=True) if key in ours and _near(run, ours[key])]


def _near(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return abs(datetime.fromisoformat(one["date"]) - datetime.fromisoformat(other["date"])) <= APART


def fault(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What shows that two runs did not train the same: their tokens or first losses; None where nothing does.

    Later losses are compared but for gradual runs, beside which other tools train all blocks.
    """
    if theirs["tokens"] != ours["tokens"]:
        return f"{theirs['tokens']} tokens, llmtune {ours['tokens']}"
    gap = abs(theirs["first_loss"] / ours["first_loss"] - 1)
    if not gap <= FIRST_LOSS[theirs["settings"]["precision"]]:  # NaN too
        return f"first loss {theirs['first_loss']:.4f}, llmtune {ours['first_loss']:.4f}"
    later = zip(theirs["losses"][1:NEXT], ours["losses"][1:NEXT], strict=False)
    for step, (loss, expected) in enumerate(later, 2):
        if theirs["arm"] not in GRADUAL and not abs(loss / expected - 1) <= NEXT_LOSSES:
            return f"loss {loss:.4f} at step {step}, llmtune {expected:.4f}"
    return None


def _times(name: str) -> Callable[[tuple[dict[str, Any], dict[str, Any]]], float]:
    return lambda pair: pair[0][name] / pair[1][name]


RATIOS: dict[str, Callable[[tuple[dict[str, Any], dict[str, Any]]], float]] = {
    "times_step": _times("seconds_per_step"),
    "times_wall": _times("wall_s"),
    "memory": lambda pair: pair[1]["peak_rss_mb"] / pair[0]["peak_rss_mb"],
}
"""How many times faster llmtune is a step and as a whole process, and its share of the tool's memory."""
