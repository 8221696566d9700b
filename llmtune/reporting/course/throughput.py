"""The report's chart of throughput: tokens a second, by step."""

from statistics import median

from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.lines import Line, Lines, legend
from llmtune.reporting.course.loss import TRAINING, smooth
from llmtune.reporting.course.stages import boundaries
from llmtune.reporting.history import History
from llmtune.reporting.html import Html, section


def throughput_section(history: History, plan: PlanTable | None) -> Html | None:
    """Show the tokens a second of each step and their running average; None where no step was timed."""
    points = history.speeds
    if not points:
        return None
    middle = median(speed for _, speed in points)
    label = f"Tokens a second by step: half of the {len(points):,} steps reach {middle:,.0f} or more"
    lines = [Line(points, TRAINING, "tokens a second", faint=True), Line(smooth(points), TRAINING, "running average")]
    chart = Lines(lines, label, Axis("tokens/s", from_zero=True), marks=boundaries(plan), height=180)
    note = f"Tokens a second, padding left out. The median step reaches {middle:,.0f}."
    keys = legend([(TRAINING, "running average; pale: each step")])
    return section("Throughput", keys, chart.draw(), note=note)
