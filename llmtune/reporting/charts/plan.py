"""The plan as a picture: a column a stage, as wide as its steps, and a row for each run of layers that train alike."""

from collections.abc import Iterator
from itertools import accumulate

from llmtune.numbers import rate
from llmtune.plan.distances import spans
from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.image import image
from llmtune.reporting.html import Html, tag
from llmtune.reporting.layers import DENSE_ROWS, alike, depth_of, names_of, peak_rate

WIDTH, NAMES, TOP, GAP = 760, 250, 30, 2
_ROW, _DENSE_ROW = 26, 12
_TEXT_PIXELS = 56
"""A cell narrower than this shows its color alone."""


def plan_words(plan: PlanTable) -> str:
    """Say in words what the picture shows."""
    stages = [f"steps {stage.steps_in_words}: {stage.trains.words(plan.blocks)}" for stage in plan.stages]
    return "What trains when, by learning rate: " + "; ".join(stages)


def plan_image(plan: PlanTable) -> str:
    """Draw the plan as an SVG file."""
    runs = alike(plan)
    dense = len(runs) > DENSE_ROWS
    height = _DENSE_ROW if dense else _ROW
    parts = list(_heads(plan))
    for index, run in enumerate(runs):
        y = TOP + index * height
        if not dense or index == len(runs) - 1 or (index % 5 == 0 and index < len(runs) - 2):
            name = f"{spans(run)}: {names_of(run, plan)}"
            parts.append(tag("text", name, x=8, y=y + height / 2, dy="0.32em"))
        parts += _cells(plan, run, y, height - GAP, not dense)
    return image(WIDTH, TOP + len(runs) * height + 8, plan_words(plan), *parts)


def _columns(plan: PlanTable) -> list[tuple[float, float]]:
    """The left end and the width of each stage's column, in pixels."""
    steps = [max(1, stage.end - stage.start) for stage in plan.stages]
    unit = (WIDTH - NAMES - 8) / sum(steps)
    return [(NAMES + unit * (end - own), unit * own) for end, own in zip(accumulate(steps), steps, strict=True)]


def _heads(plan: PlanTable) -> Iterator[Html]:
    yield tag("text", "distance from the output", x=8, y=18, class_="quiet")
    for number, (x, width) in enumerate(_columns(plan), 1):
        text = f"stage {number}" if width >= _TEXT_PIXELS else str(number)
        yield tag("text", text, x=f"{x:.1f}", y=18, class_="quiet")


def _cells(plan: PlanTable, run: list[int], y: int, height: int, shown: bool) -> Iterator[Html]:
    peak = peak_rate(plan)
    for stage, (x, width) in zip(plan.stages, _columns(plan), strict=True):
        value = stage.rates.get(run[0], 0.0)
        share = depth_of(value, peak)
        fill = f"fill:color-mix(in oklab, var(--heat) {100 * share:.0f}%, var(--page))" if value else "fill:var(--card)"
        box = {"x": f"{x:.1f}", "y": y, "width": f"{max(1.0, width - GAP):.1f}", "height": height}
        yield tag("rect", rx=2, style=fill, **box)
        if shown and width >= _TEXT_PIXELS:
            text = {"x": f"{x + 6:.1f}", "y": y + height / 2, "dy": "0.32em"}
            color = {"style": "fill:var(--page)"} if share > 0.55 else {} if value else {"class_": "quiet"}
            yield tag("text", rate(value) if value else "frozen", **text, **color)
