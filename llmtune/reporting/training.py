"""The report's training part: the loss, the rates, and what trained when."""

import math
from itertools import groupby
from typing import Any

from llmtune.numbers import count, rate
from llmtune.plan.distances import spans
from llmtune.plan.table import PlanTable, StageRow
from llmtune.reporting.charts import Chart, Line, Point, ramp
from llmtune.reporting.html import Html, section, table, tag
from llmtune.run_log import Record

DENSE_ROWS = 24


def loss_section(log: list[Record], plan: PlanTable | None) -> Html:
    """The training loss, its running average, the validation points and the stage boundaries."""
    points = [(record["step"], record["loss"]) for record in log if _finite(record.get("loss"))]
    checks = [(record["step"], record["eval_loss"]) for record in log if _finite(record.get("eval_loss"))]
    if not points:
        return section("Loss", note="No training step is in the log yet.")
    raw = Line(points, "var(--tuned)", "loss of each step", faint=True)
    mean = Line(_smoothed(points), "var(--tuned)", "running average of the training loss")
    lines = [raw, mean, Line(checks, "var(--good)", "validation loss")]
    dots = [(point, f"step {point[0]}: validation loss {point[1]:.4f}") for point in checks]
    legend = [_key("var(--tuned)", "training, running average; pale: each step")]
    legend += [_key("var(--good)", f"validation, last {checks[-1][1]:.4f}")] if checks else []
    label = (
        f"Loss from {points[0][1]:.2f} at step {points[0][0]} to {lines[1].points[-1][1]:.2f} at step {points[-1][0]}"
    )
    chart = Chart(lines, label, dots, _boundaries(plan))
    return section(
        "Loss", tag("p", *legend, class_="legend"), chart.draw(), note="Mean cross-entropy per answer token."
    )


def rates_section(log: list[Record], plan: PlanTable | None) -> Html:
    """The learning rate of each distance over the steps; distances that share one course share one line."""
    records = [record for record in log if record.get("lr")]
    if not records:
        return section("Learning rate by distance", note="No learning rate is in the log yet.")
    steps = [record["step"] for record in records]
    courses: dict[tuple[float, ...], list[int]] = {}
    for distance in sorted({int(key) for record in records for key in record["lr"]}):
        course = tuple(float(record["lr"].get(str(distance), 0.0)) for record in records)
        courses.setdefault(course, []).append(distance)
    groups = sorted(courses.items(), key=lambda item: item[1][0], reverse=True)
    farthest = max(1, max(group[-1] for _, group in groups))
    lines = [_rate_line(steps, course, group, farthest, len(groups)) for course, group in groups]
    peaks = [max(course) for course, _ in groups if max(course) > 0]
    log_scale = bool(peaks) and max(peaks) > 50 * min(peaks)
    floor = max(min(peaks) / 10, max(peaks) * 1e-15) if log_scale else 0.0
    label = f"Learning rates of {len(groups)} groups of layers over {steps[-1]} steps"
    chart = Chart(lines, label, marks=_boundaries(plan), floor=floor, rates=True)
    scale = " The scale is logarithmic." if log_scale else ""
    return section(
        "Learning rate by distance", _rate_legend(groups, farthest), chart.draw(), note=_coordinate(plan) + scale
    )


def _rate_line(steps: list[int], course: tuple[float, ...], group: list[int], farthest: int, lines: int) -> Line:
    colour = ramp(group[0] / farthest) if lines > 1 else "var(--tuned)"
    return Line(list(zip(steps, course, strict=True)), colour, f"distance {spans(group)}: peak {rate(max(course))}")


def _rate_legend(groups: list[tuple[tuple[float, ...], list[int]]], farthest: int) -> Html:
    """One key a line, or a colour ramp with its two ends where there are many lines."""
    near_first = list(reversed(groups))
    if len(groups) == 1:
        return tag("p", _key("var(--tuned)", f"distance {spans(groups[0][1])}, all at one rate"), class_="legend")
    if len(groups) <= 6:
        return tag("p", *(_key(ramp(g[0] / farthest), f"distance {spans(g)}") for _, g in near_first), class_="legend")
    (first, near), (last, far) = near_first[0], near_first[-1]
    ends = (f"{spans(near)} (peak {rate(max(first))})", f"{spans(far)} (peak {rate(max(last))})")
    bar = tag("i", class_="ramp")
    return tag("p", f"{len(groups)} lines, distance {ends[0]} ", bar, f" {ends[1]}", class_="legend")


def trained_section(log: list[Record], plan: PlanTable | None) -> Html:
    """What trained when: a strip of stage x distance shaded by peak rate, and one table row a stage."""
    if plan is None:
        return section("What trained when", note="The run holds no plan yet.")
    head: list[object] = [
        "stage",
        "steps",
        "trains",
        "rate at the output",
        "lowest rate",
        "tensors",
        "parameters",
        "share",
    ]
    rows = [_stage_row(number, stage, plan) for number, stage in enumerate(plan.stages, 1)]
    lines = [*plan.notes, *(record["frozen_blocks"] for record in log if "frozen_blocks" in record)]
    notes = [tag("p", note, class_="note") for note in lines]
    return section(
        "What trained when",
        _strip(plan),
        table(head, rows, {3, 4, 5, 6, 7}),
        *notes,
        note="The highest rate that each stage has at each distance.",
    )


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


def _strip(plan: PlanTable) -> Html:
    """A table with a column a stage, as wide as its steps, and a row for each run of distances that trained alike."""
    stages = plan.stages
    distances = range(plan.blocks + 2)
    peak = max(value for stage in stages for value in stage.rates.values())
    runs = [list(run) for _, run in groupby(distances, key=lambda distance: _profile(stages, distance))]
    total = max(1, stages[-1].end - stages[0].start)
    columns = [tag("col", class_="name"), *(tag("col", style=_width(stage, total)) for stage in stages)]
    head = tag("tr", tag("th", "distance"), *(tag("th", f"stage {index + 1}") for index in range(len(stages))))
    dense = len(runs) > DENSE_ROWS
    rows = []
    for index, run in enumerate(runs):
        shown = not dense or index % 5 == 0 or index == len(runs) - 1
        name = tag("th", f"{spans(run)} ", tag("small", _layers(run, plan)) if shown else None, scope="row")
        rows.append(tag("tr", name, *(_cell(stage, run, peak, bool(shown)) for stage in stages)))
    body = tag(
        "table", tag("colgroup", *columns), tag("thead", head), tag("tbody", *rows), class_=f"strip{' dense' * dense}"
    )
    return tag("div", body, class_="scroll")


def _width(stage: StageRow, total: int) -> str:
    return f"width:{72 * (stage.end - stage.start) / total:.1f}%"


def _profile(stages: list[StageRow], distance: int) -> tuple[float, ...]:
    return tuple(stage.rates.get(distance, 0.0) for stage in stages)


def _cell(stage: StageRow, run: list[int], peak: float, shown: bool) -> Html:
    value = stage.rates.get(run[0])
    if not value:
        return tag("td", "frozen" if shown else None, class_="frozen")
    depth = max(0.12, 1 + math.log10(value / peak) / 3)
    number_of = sum(stage.parameters.get(distance, 0) for distance in run)
    title = f"distance {spans(run)}: peak rate {rate(value)}, {count(number_of)} parameters"
    style = f"background:color-mix(in oklab, var(--heat) {100 * depth:.0f}%, var(--page))"
    return tag("td", rate(value) if shown else None, style=style, class_="deep" if depth > 0.55 else None, title=title)


def _layers(run: list[int], plan: PlanTable) -> str:
    """The names of a run of distances in a model: head and final norm, blocks from the first, embeddings."""
    blocks = plan.blocks
    inner = [blocks - distance + 1 for distance in run if 0 < distance <= blocks]
    names = ["head and final norm"] if run[0] == 0 else []
    if inner:
        names.append(f"block {inner[0]}" if len(inner) == 1 else f"blocks {inner[-1]} to {inner[0]}")
    return ", ".join([*names, "embeddings"] if run[-1] > blocks else names)


def _coordinate(plan: PlanTable | None) -> str:
    last = f", {plan.blocks} the first, {plan.blocks + 1} the embeddings" if plan else ""
    return f"Distance counts from the output: 0 is head and final norm, 1 the last block{last}."


def _boundaries(plan: PlanTable | None) -> list[tuple[float, str]]:
    stages = plan.stages if plan else []
    return [(stage.start, f"stage {number}") for number, stage in enumerate(stages, 1)] if len(stages) > 1 else []


def _smoothed(points: list[Point]) -> list[Point]:
    """The mean of the neighbours within a fortieth of the run on either side, fewer at the ends."""
    reach = max(1, len(points) // 40)
    near = (points[max(0, i - min(reach, len(points) - 1 - i)) : i + min(reach, i) + 1] for i in range(len(points)))
    return [(point[0], sum(y for _, y in some) / len(some)) for point, some in zip(points, near, strict=True)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _key(colour: str, text: str) -> Html:
    return tag("span", tag("i", style=f"background:{colour}"), text)
