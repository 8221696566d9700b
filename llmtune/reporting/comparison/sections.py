"""The sections of a comparison's page."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from llmtune.arms.record import ArmRecord, Comparison
from llmtune.arms.results import titled
from llmtune.arms.sentences import metric_title
from llmtune.arms.table import LEFT, Cells
from llmtune.arms.verdict import Numbers, Verdict
from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.axes import STEPS, Axis
from llmtune.reporting.charts.dots import Dot
from llmtune.reporting.comparison.charts import Course, against, by_size, colors, losses, rates
from llmtune.reporting.html import Html, fold, join, section, table, tag
from llmtune.reporting.layers import strip
from llmtune.reporting.values import number, whole

_NOTE = "± is one standard error, over held-out rows and, with several seeds, over trainings."
SECONDS = Axis("training seconds", ",.4~r", from_zero=True)


def trained_arms(comparison: Comparison) -> list[tuple[str, ArmRecord]]:
    """Return every arm, and every baseline that trains, with its title."""
    arms = [(titled(one["name"], one["size"]), one) for one in comparison["arms"]]
    return arms + [(titled(one["name"], one["size"]), one["arm"]) for one in comparison["baselines"] if "arm" in one]


def largest(comparison: Comparison, size: float) -> list[tuple[str, ArmRecord]]:
    """Return the arms and trained baselines at the size that decides."""
    return [(name, arm) for name, arm in trained_arms(comparison) if arm["size"] == size]


def palette_of(comparison: Comparison) -> dict[str, str]:
    """Give every arm and baseline its color by its title; those of one name share one at every size."""
    entries = [*comparison["arms"], *comparison["baselines"]]
    by_name = colors([one["name"] for one in entries])
    return by_name | {titled(one["name"], one["size"]): by_name[one["name"]] for one in entries}


def table_section(comparison: Comparison, rows: Sequence[Cells], size: float, folder: Path) -> Html:
    """Show the table of every arm, with links to the pages of its runs that are there; other sizes are folded."""
    if not rows:
        return section("Arms", note="No arm has been trained yet.")
    links = {name: _links(arm, folder) for name, arm in trained_arms(comparison)}
    entries = [*comparison["arms"], *comparison["baselines"]]
    first = {titled(one["name"], one["size"]) for one in entries if one["size"] == size}
    shown = [row for row in rows if row["arm"] in first]
    rest = [row for row in rows if row["arm"] not in first]
    quality = [title for title in ("arm", metric_title(comparison), "loss", "verdict") if title in rows[0]]
    tables = _tables(shown, quality, links)
    folded = fold("With other shares of the training rows (name@share)", *_tables(rest, quality, links))
    return section("Arms", *tables, folded if rest else None, note=_NOTE)


def _tables(rows: Sequence[Cells], quality: Sequence[str], links: dict[str, Html | None]) -> list[Html]:
    """Show how good arms are, then what they took."""
    cost = ["arm", *(title for title in rows[0] if title not in quality)] if rows else []
    taken = [row for row in rows if any(row[title] for title in cost[1:])]
    told = [_TOOK[title] for title in cost if title in _TOOK]
    costs = [tag("h3", "What each took"), tag("p", *told, class_="note"), _columns(taken, cost)] if taken else []
    named = [{**row, "arm": _named(row, links)} for row in rows]
    return [_columns(named, quality), *costs]


_TOOK = {
    "rate": "Rate: the learning rate that the search chose. ",
    "minutes": "Minutes: one training, of everything that the arm took with its search. ",
    "peak memory": "Peak memory: on CPUs, over what the process held before it loaded the base, as it is predicted. ",
    "to 90%": "To 90%: until a training had come 90% of the way to the lowest validation loss of all arms. ",
}
"""What the titles of costs mean."""


def _named(row: Cells, links: dict[str, Html | None]) -> Html:
    return join(tag("b" if row.get("verdict") == "wins" else "span", row["arm"]), links.get(row["arm"]))


def _columns(rows: Sequence[Cells], titles: Sequence[str]) -> Html:
    numeric = {index for index, title in enumerate(titles) if title not in LEFT}
    words = {index for index, title in enumerate(titles) if title in LEFT and title != "arm"}
    return table([*titles], [[row[title] for title in titles] for row in rows], numeric, words)


def _links(arm: ArmRecord, folder: Path) -> Html | None:
    pages = [(seed["seed"], f"{seed['run'].strip('/')}/report.html") for seed in arm.get("seeds", [])]
    shown = [
        join(" ", tag("a", f"seed {seed}", href=quote(page)))
        for seed, page in pages
        if not page.startswith("..") and (folder / page).is_file()
    ]
    return tag("small", *shown) if shown else None


Unit = tuple[str, float]
"""A cost in words, and how much of it is one."""
Cost = Literal["seconds", "peak_bytes"]


def cost_section(comparison: Comparison, verdict: Verdict) -> Html | None:
    """Draw quality against training minutes, and against peak memory."""
    quality = metric_title(comparison)
    shown = [one for one in verdict["results"] if one["size"] == verdict.get("size")] if verdict["winner"] else []
    palette = palette_of(comparison)
    costs: tuple[tuple[str, Cost, Unit, Unit], ...] = (
        ("Time", "seconds", ("seconds of one training", 1), ("minutes of one training", 60)),
        ("Memory", "peak_bytes", ("peak memory, MB", 1e6), ("peak memory, GB", 1e9)),
    )
    charts = []
    for name, key, small, large in costs:
        cost, unit = _unit(shown, key, small, large)
        charts.append((name, against(list(_dots(shown, key, unit, palette)), cost, quality)))
    drawn = [part for name, one in charts if one for part in (tag("h3", name), one)]
    return section("Quality against cost", *drawn, note=f"Bars: {_NOTE[4:]}") if drawn else None


def _unit(shown: list[Numbers], key: Cost, small: Unit, large: Unit) -> Unit:
    """Return the large unit where the highest cost is two of it or more."""
    return large if max((one[key] or 0 for one in shown), default=0) >= 2 * large[1] else small


def _dots(shown: list[Numbers], key: Cost, unit: float, palette: dict[str, str]) -> Iterator[Dot]:
    for one in shown:
        cost, value = one[key], one["score"]["value"]
        if cost and value is not None:
            yield Dot(one["name"], cost / unit, value, one["score"]["stderr"], color=palette[one["name"]])


def curves_section(comparison: Comparison, size: float) -> Html | None:
    """Draw the validation losses of arms of a size on one axis: over seconds, and behind a fold over steps."""
    arms, palette = largest(comparison, size), palette_of(comparison)
    chart = losses(_curves(arms, "seconds"), SECONDS, palette)
    steps = losses(_curves(arms, "step"), STEPS, palette)
    note = "Every training from its first step, without start-up; a line a seed."
    return section("Validation loss", chart, fold("By steps", steps), note=note) if chart and steps else None


def _curves(arms: list[tuple[str, ArmRecord]], over: str) -> list[Course]:
    return [
        (name, [(float(point[over]), point["loss"]) for point in seed["curve"] if number(point["loss"]) is not None])  # type: ignore[literal-required]
        for name, arm in arms
        for seed in arm.get("seeds", [])
    ]


def advantages_section(verdict: Verdict) -> Html | None:
    """Say what the training of a pretrained model gains, or why that was not measured."""
    titles = {"transfer": "Transfer", "better": "Better results", "quicker": "Quicker"}
    lines = [
        tag("li", tag("b", f"{titles[name]}: "), f"{one['words']}.") for name, one in verdict["advantages"].items()
    ]
    return section("What training a pretrained model gains", tag("ul", *lines)) if lines else None


def sizes_section(comparison: Comparison, verdict: Verdict) -> Html | None:
    """Draw quality by data size, where arms were trained on several."""
    rows = whole(comparison["train"].get("rows"))
    by_name: dict[str, list[tuple[float, float]]] = {}
    for one in verdict["results"]:
        if rows and one["score"]["value"] is not None:
            by_name.setdefault(one["name"], []).append((max(1.0, rows * one["size"]), one["score"]["value"]))
    chart = by_size(list(by_name.items()), metric_title(comparison), palette_of(comparison))
    return section("Quality by data size", chart) if chart else None


def search_section(comparison: Comparison, size: float) -> Html | None:
    """Draw the loss of each learning rate that was tried by arms of a size."""
    courses: list[Course] = [
        (name, [(_output(one["lr"]), one["loss"]) for one in arm.get("search", []) if number(one["loss"]) is not None])  # type: ignore[misc]
        for name, arm in largest(comparison, size)
    ]
    chart = rates(courses, palette_of(comparison))
    note = "Validation loss at the end of each try. Of several stages, the rate of the first."
    return section("Search of the learning rate", chart, note=note) if chart else None


def _output(lr: float | list[float]) -> float:
    return lr[0] if isinstance(lr, list) else lr


def plans_section(comparison: Comparison, size: float) -> Html | None:
    """Show what trains when in each arm of a size."""
    strips = [
        part
        for name, arm in largest(comparison, size)
        if (plan := _plan(arm))
        for part in (tag("h3", f"{name}: {arm['method']}" if "method" in arm else name), strip(plan, name))
    ]
    note = "The highest rate that each stage has at each distance from the output."
    return section("What trains when", *strips, note=note) if strips else None


def _plan(arm: ArmRecord) -> PlanTable | None:
    try:
        return PlanTable.from_json(arm["plan"]) if "plan" in arm else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
