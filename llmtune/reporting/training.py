"""The report's charts: the loss with its validations, and the learning rate of each distance."""

from llmtune.numbers import rate
from llmtune.plan.distances import spans
from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.drawing import Chart, Line, ramp
from llmtune.reporting.charts.scales import log_floor, spans_decades
from llmtune.reporting.history import History, Point
from llmtune.reporting.html import Html, section, tag

TRAINING, VALIDATION = "var(--tuned)", "var(--valid)"
LISTED_VALIDATIONS = 12

Group = tuple[list[float], list[int]]
"""The course of a rate over the steps, and the distances that share it."""


def loss_section(history: History, plan: PlanTable | None) -> Html:
    """Show each step's loss, its running average, the validations and the stage boundaries."""
    points, checks = history.losses, history.validation_losses
    warnings = [tag("p", warning, class_="warn") for warning in history.warnings]
    if not (points or checks):
        return section("Loss", *warnings, note=None if warnings else "No training step is in the log yet.")
    chart = loss_chart(history, plan)
    scale = " The scale is logarithmic." if chart.floor else ""
    note = f"Mean cross-entropy per answer token.{scale}"
    return section("Loss", _loss_legend(points, checks), chart.draw(), _list(checks), *warnings, note=note)


def loss_chart(history: History, plan: PlanTable | None) -> Chart:
    """Return the chart of a history that has a loss: each step, the running average, the validations, the stages."""
    points, checks = history.losses, history.validation_losses
    mean = smooth(points)
    lines = [Line(points, TRAINING, "training loss", faint=True), Line(mean, TRAINING, "running average")]
    lines.append(Line(checks, VALIDATION, "validation loss", marked=True))
    ys = [y for _, y in (*points, *checks)]
    return Chart(lines, _label(mean, checks), _boundaries(plan), floor=log_floor(ys) if spans_decades(ys) else 0.0)


def _loss_legend(points: list[Point], checks: list[Point]) -> Html:
    training = _key(TRAINING, "training, running average; pale: each step") if points else None
    validation = _key(VALIDATION, f"validation, last {checks[-1][1]:.4g}", "dot") if checks else None
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


def rates_section(history: History, plan: PlanTable | None) -> Html:
    """The learning rate of each distance over the steps; distances that share one course share one line."""
    groups = _courses(history.rates)
    if not groups:
        return section("Learning rate by distance", note="No learning rate is in the log yet.")
    steps = [step for step, _ in history.rates]
    farthest = max(1, max(distances[-1] for _, distances in groups))
    lines = [_rate_line(steps, group, farthest, len(groups)) for group in groups]
    peaks = [max(course) for course, _ in groups if max(course) > 0]
    log_scale = bool(peaks) and max(peaks) > 50 * min(peaks)
    floor = max(min(peaks) / 10, max(peaks) * 1e-15) if log_scale else 0.0
    sets = "one group" if len(groups) == 1 else f"{len(groups)} groups"
    label = f"Learning rates of {sets} of layers over {steps[-1]:,} steps"
    chart = Chart(lines, label, marks=_boundaries(plan), floor=floor, rates=True)
    scale = " The scale is logarithmic." if log_scale else ""
    note = _coordinate(plan) + scale
    return section("Learning rate by distance", _rate_legend(groups, farthest), chart.draw(), note=note)


def _courses(rates: list[tuple[int, dict[int, float]]]) -> list[Group]:
    """Group the distances that have one course, the farthest group first."""
    courses: dict[tuple[float, ...], list[int]] = {}
    for distance in sorted({distance for _, by_distance in rates for distance in by_distance}):
        course = tuple(by_distance.get(distance, 0.0) for _, by_distance in rates)
        courses.setdefault(course, []).append(distance)
    groups = [(list(course), distances) for course, distances in courses.items()]
    return sorted(groups, key=lambda group: group[1][0], reverse=True)


def _rate_line(steps: list[int], group: Group, farthest: int, lines: int) -> Line:
    course, distances = group
    color = ramp(distances[0] / farthest) if lines > 1 else TRAINING
    points: list[Point] = list(zip(steps, course, strict=True))
    return Line(points, color, f"distance {spans(distances)}: peak {rate(max(course))}")


def _rate_legend(groups: list[Group], farthest: int) -> Html:
    """One key a line, or a color ramp with its two ends where there are many lines."""
    near_first = list(reversed(groups))
    if len(groups) == 1:
        return tag("p", _key(TRAINING, f"distance {spans(groups[0][1])}, all at one rate"), class_="legend")
    if len(groups) <= 6:
        return tag("p", *(_key(ramp(d[0] / farthest), f"distance {spans(d)}") for _, d in near_first), class_="legend")
    (first, near), (last, far) = near_first[0], near_first[-1]
    ends = (f"{spans(near)} (peak {rate(max(first))})", f"{spans(far)} (peak {rate(max(last))})")
    bar = tag("i", class_="ramp")
    return tag("p", f"{len(groups)} lines, distance {ends[0]} ", bar, f" {ends[1]}", class_="legend")


def _coordinate(plan: PlanTable | None) -> str:
    last = f", {plan.blocks} the first, {plan.blocks + 1} the embeddings" if plan else ""
    return f"Distance counts from the output: 0 is head and final norm, 1 the last block{last}."


def _boundaries(plan: PlanTable | None) -> list[tuple[float, str]]:
    stages = plan.stages if plan else []
    return [(stage.start, f"stage {number}") for number, stage in enumerate(stages, 1)] if len(stages) > 1 else []


def smooth(points: list[Point]) -> list[Point]:
    """The mean of the neighbors within a fortieth of the run on either side, fewer at the ends."""
    reach = max(1, len(points) // 40)
    near = (points[max(0, i - min(reach, len(points) - 1 - i)) : i + min(reach, i) + 1] for i in range(len(points)))
    return [(point[0], sum(y for _, y in some) / len(some)) for point, some in zip(points, near, strict=True)]


def _key(color: str, text: str, kind: str | None = None) -> Html:
    return tag("span", tag("i", style=f"background:{color}", class_=kind), text)
