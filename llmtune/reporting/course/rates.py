"""The report's chart of the learning rate of each distance."""

from llmtune.numbers import rate
from llmtune.plan.distances import spans
from llmtune.plan.table import PlanTable
from llmtune.reporting.charts.axes import RATE, Axis
from llmtune.reporting.charts.lines import Line, Lines, key, ramp
from llmtune.reporting.course.loss import TRAINING
from llmtune.reporting.course.stages import boundaries
from llmtune.reporting.history import History, Point
from llmtune.reporting.html import Html, section, tag

Group = tuple[list[float], list[int]]
"""The course of a rate over the steps, and the distances that share it."""


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
    domain = (floor, 1.1 * max(peaks)) if log_scale else None
    y = Axis("learning rate", RATE, log=log_scale, domain=domain)
    chart = Lines(lines, label, y, marks=boundaries(plan))
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
        return tag("p", key(TRAINING, f"distance {spans(groups[0][1])}, all at one rate"), class_="legend")
    if len(groups) <= 6:
        return tag("p", *(key(ramp(d[0] / farthest), f"distance {spans(d)}") for _, d in near_first), class_="legend")
    (first, near), (last, far) = near_first[0], near_first[-1]
    ends = (f"{spans(near)} (peak {rate(max(first))})", f"{spans(far)} (peak {rate(max(last))})")
    bar = tag("i", class_="ramp")
    return tag("p", f"{len(groups)} lines, distance {ends[0]} ", bar, f" {ends[1]}", class_="legend")


def _coordinate(plan: PlanTable | None) -> str:
    last = f", {plan.blocks} the first, {plan.blocks + 1} the embeddings" if plan else ""
    return f"Distance counts from the output: 0 is head and final norm, 1 the last block{last}."
