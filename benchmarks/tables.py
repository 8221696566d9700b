"""The tables of docs/performance.md, from the results of each machine. Run: python -m benchmarks.tables"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.store import FOLDER, ROOT, describe
from benchmarks.summary import summarize
from benchmarks.targets import judge
from llmtune.files import read_json, write_text

DOCUMENT = ROOT / "docs" / "performance.md"
MARKS = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
SHAPES = {"135M": "SmolLM2-135M-Instruct", "361M": "361M, random weights", "1.07B": "1.07B, random weights"}
COLUMNS = (
    *("arm", "tool", "s/step", "times", "command to end, s", "times", "peak GB", "share", "first loss", "last loss"),
    *("rate", "runs"),
)


def page(text: str, results: Sequence[dict[str, Any]]) -> str:
    """A document with the tables of these results between its marks."""
    tables = "\n".join(of_machine(result) for result in results) or "No machine has been measured.\n"
    return MARKS.sub(lambda _: f"\n{tables}\n", text)


def of_machine(result: dict[str, Any]) -> str:
    """The heading, the targets and the table of each shape of one machine, as Markdown."""
    rows = summarize(result["runs"])
    parts = [heading(result), targets(rows)]
    for size, length in dict.fromkeys((row["size"], row["rows"]) for row in rows):
        same = [row for row in rows if (row["size"], row["rows"]) == (size, length)]
        parts += [f"**{SHAPES.get(size, size)}, rows of {length} tokens{_batch(result, size, length)}**", figures(same)]
    return "\n\n".join(parts) + "\n"


def heading(result: dict[str, Any]) -> str:
    """Which machine it was, when, on which code and libraries, and how fast products were there."""
    machine, runs = result["machine"], result["runs"]
    dates, commits = sorted({run["date"][:10] for run in runs}), sorted({run["commit"] for run in runs})
    rates = [run["gemm_gflops"] / 1000 for run in runs]
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"### {describe(machine)}, {machine['memory_gb']} GB of memory"
    libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    own = sorted({f"{run['tool'].partition('-')[0]} {run['version']}" for run in runs if run.get("version")})
    code = f"Measured {days}, commit {', '.join(commits)}."
    rate = f"Square bf16 products ran at {min(rates):.2f} to {max(rates):.2f} TFLOP/s meanwhile."
    return f"{where}\n\n{code} {rate}\nLibraries: {', '.join([libraries, *own])}."


def _batch(result: dict[str, Any], size: str, length: str) -> str:
    settings = next(run["settings"] for run in result["runs"] if (run["size"], run["rows"]) == (size, length))
    return f", {settings['batch']} a step, {settings['steps']} steps an epoch"


def targets(rows: Sequence[dict[str, Any]]) -> str:
    """The table of what was to be reached."""
    header = ("arm", "model/tokens a row", "times faster a step", "times faster as a process", "share of memory")
    return _table(header, judge(rows))


def figures(rows: Sequence[dict[str, Any]]) -> str:
    """The table of one shape."""
    return _table(COLUMNS, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    names = [row["arm"], row["tool"]]
    if not row["runs"]:
        return [*names, f"failed: {row['error'][:80].replace('|', '/')}", *[""] * (len(COLUMNS) - 3)]
    if "wrong" in row:
        return [*names, f"WRONG: {row['wrong']}", *[""] * (len(COLUMNS) - 3)]
    ours = row["tool"] == "llmtune"
    step, wall, share = (
        "" if ours or key not in row else f"{row[key]:.2f}" for key in ("times_step", "times_wall", "memory")
    )
    more = [f"{row['peak_rss_mb'] * 2**20 / 1e9:.2f}", share, f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}"]
    failed = f", {row['failed']} failed" if row["failed"] else ""
    last = [f"{row['utilization']:.2f}", f"{row['runs']}{failed}"]
    return [*names, _spread(row, "seconds_per_step", 3), step, _spread(row, "wall_s", 1), wall, *more, *last]


def _spread(row: dict[str, Any], name: str, digits: int) -> str:
    apart = f" ± {row[f'{name}_spread'] / 2:.{digits}f}" if row["runs"] > 1 else ""
    return f"{row[name]:.{digits}f}{apart}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def all_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The results of every machine."""
    return [read_json(file) for file in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    write_text(DOCUMENT, page(DOCUMENT.read_text(), all_results()))
