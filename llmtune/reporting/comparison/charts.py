"""Charts of things side by side: quality against a cost, losses over time on one axis, rates, data sizes."""

from collections.abc import Mapping, Sequence

from llmtune.reporting.charts.axes import RATE, Axis
from llmtune.reporting.charts.dots import Dot, dots
from llmtune.reporting.charts.lines import Line, Lines, legend
from llmtune.reporting.charts.scales import needs_log, spans_decades
from llmtune.reporting.history import Point
from llmtune.reporting.html import Html, join

COLORS = (
    "#2f6fd0",
    "#c2560c",
    "#2a8a57",
    "#a6469e",
    "#b3372c",
    "#0f8a94",
    "#7a5bd0",
    "#8a6d12",
    "#c0447a",
    "#5b7a1f",
    "#4f7f9e",
    "#9a5b3c",
    "#6b7280",
)
"""Colors of lines, each to be told from a light and a dark page."""

Course = tuple[str, Sequence[Point]]
"""A name and its points."""


def colors(names: Sequence[str]) -> dict[str, str]:
    """Give each name a color, the same on every chart of a page."""
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(dict.fromkeys(names))}


def against(points: Sequence[Dot], cost: str, quality: str) -> Html | None:
    """Draw quality with its errors over a cost; None for nothing to draw."""
    if not points:
        return None
    told = "; ".join(f"{one.title}: {quality} {one.y:.3f} at {one.x:.3g}" for one in points)
    log = spans_decades(one.x for one in points)
    label, x, y = f"{quality} against {cost}. {told}", Axis(cost, log=log, padding=40), Axis(quality, padding=24)
    return join(legend([(one.color, one.title) for one in points]), dots(points, label, x, y))


def losses(courses: Sequence[Course], x: Axis, palette: Mapping[str, str]) -> Html | None:
    """Draw validation losses over one axis, a line a training; trainings of one name share a color."""
    shown = [(name, list(points)) for name, points in courses if points]
    if not shown:
        return None
    y = Axis("validation loss", log=spans_decades(value for _, points in shown for _, value in points))
    told = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in shown)
    return _drawn(shown, f"Validation loss over {x.title}: {told}", y, x, palette)


def rates(courses: Sequence[Course], palette: Mapping[str, str]) -> Html | None:
    """Draw the loss that each learning rate reached in the search; None without a search."""
    shown = [(name, sorted(points)) for name, points in courses if points]
    if not shown:
        return None
    told = "; ".join(f"{name} lowest at {min(points, key=lambda point: point[1])[0]:.2g}" for name, points in shown)
    x = Axis("learning rate at the output", RATE, log=True)
    y = Axis("validation loss", log=needs_log(loss for _, points in shown for _, loss in points))
    return _drawn(shown, f"Loss by learning rate: {told}", y, x, palette)


def by_size(courses: Sequence[Course], quality: str, palette: Mapping[str, str]) -> Html | None:
    """Draw quality by the number of training rows; None where there is but one."""
    shown = [(name, sorted(points)) for name, points in courses if len(points) > 1]
    if not shown:
        return None
    x = Axis("training rows", ",d", log=True)
    told = "; ".join(f"{name} from {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, points in shown)
    return _drawn(shown, f"{quality} by training rows: {told}", Axis(quality), x, palette)


def _drawn(shown: Sequence[tuple[str, list[Point]]], label: str, y: Axis, x: Axis, palette: Mapping[str, str]) -> Html:
    lines = [Line(points, palette[name], name, marked=len(points) < 12, solid=True) for name, points in shown]
    keys = [(palette[name], name) for name in dict.fromkeys(name for name, _ in shown)]
    return join(legend(keys), Lines(lines, label, y, x).draw())
