"""The report's chart of the loss: each step, the running average, and the validations."""

from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.lines import Line, Lines, key
from llmtune.reporting.charts.scales import spans_decades
from llmtune.reporting.course.stages import boundaries
from llmtune.reporting.history import History, Point
from llmtune.reporting.html import Html, section, tag

TRAINING, VALIDATION = "var(--tuned)", "var(--valid)"
LISTED_VALIDATIONS = 12


def loss_section(history: History, plan: PlanTable | None) -> Html:
    """Show each step's loss, its running average, the validations and the stage boundaries."""
    points, checks = history.losses, history.validation_losses
    warnings = [tag("p", warning, class_="warn") for warning in history.warnings]
    if not (points or checks):
        return section("Loss", *warnings, note=None if warnings else "No training step is in the log yet.")
    chart = loss_chart(history, plan)
    scale = " The scale is logarithmic." if chart.y.log else ""
    note = f"Mean cross-entropy per answer token.{scale}"
    return section("Loss", _loss_legend(points, checks), chart.draw(), _list(checks), *warnings, note=note)


def loss_chart(history: History, plan: PlanTable | None) -> Lines:
    """Return the chart of a history that has a loss: each step, the running average, the validations, the stages."""
    points, checks = history.losses, history.validation_losses
    mean = smooth(points)
    lines = [Line(points, TRAINING, "training loss", faint=True), Line(mean, TRAINING, "running average")]
    lines.append(Line(checks, VALIDATION, "validation loss", marked=True))
    ys = [y for _, y in (*points, *checks)]
    y = Axis("loss", log=spans_decades(ys))
    return Lines(lines, _label(mean, checks), y, marks=boundaries(plan))


def _loss_legend(points: list[Point], checks: list[Point]) -> Html:
    training = key(TRAINING, "training, running average; pale: each step") if points else None
    validation = key(VALIDATION, f"validation, last {checks[-1][1]:.4g}", "dot") if checks else None
    return tag("p", training, validation, class_="legend")


def _label(mean: list[Point], checks: list[Point]) -> str:
    """Say in words what the chart shows."""
    parts = []
    if mean:
        (first, start), (last, end) = mean[0], mean[-1]
        parts.append(f"training loss from {start:.4g} at step {first:,} to {end:.4g} at step {last:,}")
    if checks:
        amount = "one validation," if len(checks) == 1 else f"{len(checks):,} validations, the last"
        parts.append(f"{amount} {checks[-1][1]:.4g}")
    return "Loss by step: " + "; ".join(parts)


def _list(checks: list[Point]) -> Html | None:
    """List the validations in words, the first and the last where they are many."""
    few = checks if len(checks) <= LISTED_VALIDATIONS else [checks[0], checks[-1]]
    listed = ", ".join(f"{loss:.4g} at step {step:,}" for step, loss in few)
    return tag("p", f"Validation loss: {listed}.", class_="note") if checks else None


def smooth(points: list[Point]) -> list[Point]:
    """The mean of the neighbors within a fortieth of the run on either side, fewer at the ends."""
    reach = max(1, len(points) // 40)
    near = (points[max(0, i - min(reach, len(points) - 1 - i)) : i + min(reach, i) + 1] for i in range(len(points)))
    return [(point[0], sum(y for _, y in some) / len(some)) for point, some in zip(points, near, strict=True)]
