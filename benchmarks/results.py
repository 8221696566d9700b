"""The bench's runs as a table: medians and spreads, and each tool beside llmtune."""

import math
import statistics
from typing import Any

MEDIANS = (
    "seconds_per_step",
    "cpu_s_per_step",
    "tokens_per_s",
    "peak_rss_mb",
    "peak_gpu_mb",
    "wall_s",
    "final_loss",
    "utilization",
)


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one row per arm and tool: the median and the spread (largest minus smallest) of each figure."""
    rows = []
    for arm, tool in dict.fromkeys((run["arm"], run["tool"]) for run in runs):
        same = [run for run in runs if (run["arm"], run["tool"]) == (arm, tool) and "error" not in run]
        failed = [run["error"] for run in runs if (run["arm"], run["tool"]) == (arm, tool) and "error" in run]
        row: dict[str, Any] = {"arm": arm, "tool": tool, "runs": len(same)}
        if failed:
            row["error"] = failed[0]
        for name in MEDIANS:
            values = [run[name] for run in same if name in run]
            if values:
                row[name] = statistics.median(values)
                row[f"{name}_spread"] = max(values) - min(values)
        if same:
            row |= {key: same[-1][key] for key in ("tokens", "padding", "frozen_blocks")}
            row |= {"steps": len(same[-1]["losses"]), "losses": same[-1]["losses"][:3]} | compare(same, runs)
        rows.append(row)
    return rows


def compare(same: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians over paired runs: the tool's time per step over llmtune's, llmtune's memory over the tool's."""
    llmtune = {(run["arm"], run["repeat"]): run for run in runs if run["tool"] == "llmtune" and "error" not in run}
    pairs = [(run, llmtune[run["arm"], run["repeat"]]) for run in same if (run["arm"], run["repeat"]) in llmtune]
    if not pairs:
        return {}
    times = statistics.median(tool["seconds_per_step"] / ours["seconds_per_step"] for tool, ours in pairs)
    memory = statistics.median(ours["peak_rss_mb"] / tool["peak_rss_mb"] for tool, ours in pairs)
    return {"times": times, "memory": memory}


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown; x is how many times faster llmtune is, share its memory over the tool's."""
    header = (
        "| arm | tool | s/step | x | tokens/s | peak RSS MB | share | command to end s | final loss | utilization |"
    )
    lines = [header, "|---" * 10 + "|"]
    for row in rows:
        if "seconds_per_step" not in row:
            lines.append(f"| {row['arm']} | {row['tool']} | failed: {row.get('error', '')[:80]} |" + " |" * 7)
            continue
        cells = [row["arm"], row["tool"], f"{row['seconds_per_step']:.3f}", f"{row.get('times', math.nan):.2f}"]
        cells += [f"{row[name]:,.0f}" for name in ("tokens_per_s", "peak_rss_mb")]
        cells += [f"{row.get('memory', math.nan):.2f}", f"{row['wall_s']:.1f}", f"{row['final_loss']:.3f}"]
        lines.append(f"| {' | '.join([*cells, format(row['utilization'], '.2f')])} |")
    return "\n".join(lines)
