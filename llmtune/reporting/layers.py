"""The report on layers: which trained in which stage, at which rate, and which stayed frozen."""

import math
from itertools import groupby

from llmtune.numbers import count, rate
from llmtune.plan.distances import spans
from llmtune.plan.table import PlanTable, StageRow
from llmtune.reporting.html import Html, scrolling, section, table, tag

DENSE_ROWS = 24
NAME_PIXELS, STAGE_PIXELS = 110, 60  # below this the strip scrolls


def trained_section(plan: PlanTable | None, notes: list[str]) -> Html:
    """What trained when: a strip of stage x distance shaded by peak rate, one table row a stage, and notes."""
    if plan is None:
        return section("What trained when", note="The run holds no plan yet.")
    head: list[object] = ["stage", "steps", "trains", "rate at the output", "lowest rate"]
    head += ["tensors", "parameters", "share"]
    rows = [_stage_row(number, stage, plan) for number, stage in enumerate(plan.stages, 1)]
    lines = [tag("p", note, class_="note") for note in [*plan.notes, *notes]]
    note = "The highest rate that each stage has at each distance."
    return section("What trained when", strip(plan), table(head, rows, {3, 4, 5, 6, 7}), *lines, note=note)


def _stage_row(number: int, stage: StageRow, plan: PlanTable) -> list[object]:
    return [
        number,
        stage.steps_in_words,
        stage.trains.words(plan.blocks),
        rate(stage.lr),
        rate(min(stage.rates.values())),
        count(stage.count_tensors),
        count(stage.trained),
        f"{stage.trained / plan.parameters:.2%}",
    ]


def strip(plan: PlanTable, arm: str | None = None) -> Html:
    """A table with a column a stage, as wide as its steps, and a row for each run of distances that trained alike.

    `arm`, whose plan it is, tells it from others on its page.
    """
    stages, peak, runs = plan.stages, peak_rate(plan), alike(plan)
    total = max(1, stages[-1].end - stages[0].start)
    columns = [tag("col", class_="name"), *(tag("col", style=_width(stage, total)) for stage in stages)]
    head = tag("tr", tag("th", "distance"), *(tag("th", f"stage {index + 1}") for index in range(len(stages))))
    dense = len(runs) > DENSE_ROWS
    rows = []
    for index, run in enumerate(runs):
        shown = not dense or index % 5 == 0 or index == len(runs) - 1
        name = tag("th", f"{spans(run)} ", tag("small", names_of(run, plan)) if shown else None, scope="row")
        rows.append(tag("tr", name, *(_cell(stage, run, peak, bool(shown)) for stage in stages)))
    parts = (tag("colgroup", *columns), tag("thead", head), tag("tbody", *rows))
    wide = f"min-width:{NAME_PIXELS + STAGE_PIXELS * len(stages)}px"
    body = tag("table", *parts, class_=f"strip{' dense' * dense}", style=wide)
    return scrolling(body, f"What trained when, by distance{f': {arm}' if arm else ''}")


def alike(plan: PlanTable) -> list[list[int]]:
    """Return the distances of a model in runs of neighbors that have the same rate in every stage."""
    distances = range(plan.blocks + 2)
    return [list(run) for _, run in groupby(distances, key=lambda distance: _profile(plan.stages, distance))]


def peak_rate(plan: PlanTable) -> float:
    """Return the highest rate of a plan."""
    return max(value for stage in plan.stages for value in stage.rates.values())


def depth_of(value: float, peak: float) -> float:
    """Return how deep a rate is shaded: 1 for the highest, a third less a power of ten, 0 for a frozen layer."""
    return max(0.12, 1 + math.log10(value / peak) / 3) if value else 0.0


def _width(stage: StageRow, total: int) -> str:
    return f"width:{72 * (stage.end - stage.start) / total:.1f}%"


def _profile(stages: list[StageRow], distance: int) -> tuple[float, ...]:
    return tuple(stage.rates.get(distance, 0.0) for stage in stages)


def _cell(stage: StageRow, run: list[int], peak: float, shown: bool) -> Html:
    value = stage.rates.get(run[0])
    if not value:
        return tag("td", "frozen" if shown else None, class_="frozen")
    depth = depth_of(value, peak)
    number_of = sum(stage.parameters.get(distance, 0) for distance in run)
    title = f"distance {spans(run)}: peak rate {rate(value)}, {count(number_of)} parameters"
    style = f"background:color-mix(in oklab, var(--heat) {100 * depth:.0f}%, var(--page))"
    return tag("td", rate(value) if shown else None, style=style, class_="deep" if depth > 0.55 else None, title=title)


def names_of(run: list[int], plan: PlanTable) -> str:
    """Return the names of a run of distances in a model: head and final norm, blocks from the first, embeddings."""
    blocks = plan.blocks
    inner = [blocks - distance + 1 for distance in run if 0 < distance <= blocks]
    names = ["head and final norm"] if run[0] == 0 else []
    if inner:
        names.append(f"block {inner[0]}" if len(inner) == 1 else f"blocks {inner[-1]} to {inner[0]}")
    return ", ".join([*names, "embeddings"] if run[-1] > blocks else names)
