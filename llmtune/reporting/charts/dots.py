"""Measured values with their errors: over another quantity, such as quality over minutes, or beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.chart import Data, Spec, Table, chart, zooming
from llmtune.reporting.charts.scales import Scale
from llmtune.reporting.html import Html

TUNED = "var(--tuned)"


@dataclass(frozen=True)
class Dot:
    """A named value at a place, with an error of either, None where there is none."""

    title: str
    x: float
    y: float
    error: float | None = None
    error_x: float | None = None
    color: str = TUNED
    named: bool = True
    """Whether its name stands beside it; the pointer and the table always tell it."""


@dataclass(frozen=True)
class Interval:
    """A value of one of several kinds in a category, such as a model's score by a metric, with its bounds."""

    category: str
    kind: str
    value: float
    low: float
    high: float
    color: str = TUNED


def dots(values: Sequence[Dot], label: str, x: Axis, y: Axis, height: int = 300) -> Html:
    """Draw values with their errors over another quantity, each with its name."""
    x, y = (_widened(axis, bounds) for axis, bounds in ((x, _bounds_x(values)), (y, _bounds_y(values))))
    labels = named(values, x.log, y.log, height)
    rows: list[list[object]] = [
        [one.title, one.x, one.y, *_around(one.y, one.error), *_around(one.x, one.error_x), one.color, *label]
        for one, label in zip(values, labels, strict=True)
    ]
    columns = ["name", "x", "y", "low", "high", "left", "right", "color", "label", "align", "down"]
    data = {"dots": Data(columns, rows)}
    at: Spec = {"x": x.channel("x"), "y": y.channel("y")}
    color = {"field": "color", "type": "nominal", "scale": None}
    tooltip = [{"field": "name", "title": "name"}, x.tip("x"), y.tip("y")]
    layers = [
        _layer("dots", "rule", {"x": at["x"], "y": y.channel("low"), "y2": {"field": "high"}, "stroke": color}),
        _layer("dots", "rule", {"y": at["y"], "x": x.channel("left"), "x2": {"field": "right"}, "stroke": color}),
        _layer("dots", "text", {**at, "text": {"field": "label"}}),
        {**_layer("dots", "point", {**at, "fill": color, "tooltip": tooltip}), "params": zooming()},
    ]
    cells: list[list[object]] = [
        [one.title, f"{one.x:.4g}", f"{one.y:.4g}", None if one.error is None else f"{one.error:.2g}"] for one in values
    ]
    behind = Table(["name", x.title, y.title, "standard error"], cells, {1, 2, 3})
    return chart({"height": height, "layer": layers}, data, label, behind)


def intervals(values: Sequence[Interval], label: str, x: Axis) -> Html:
    """Draw values with their bounds in a row for each category, the kinds of a category one below another."""
    rows: list[list[object]] = [[one.category, one.kind, one.value, one.low, one.high, one.color] for one in values]
    data = {"intervals": Data(["category", "kind", "value", "low", "high", "color"], rows)}
    place: Spec = {
        "y": {"field": "category", "type": "nominal", "sort": None, "axis": {"title": None}},
        "yOffset": {"field": "kind", "sort": None},
    }
    color = {"field": "color", "type": "nominal", "scale": None}
    tooltip = [{"field": name, "title": name} for name in ("category", "kind")] + [x.tip("value")]
    tooltip += [{**x.tip(name), "title": name} for name in ("low", "high")]
    layers = [
        _layer("intervals", "rule", {**place, "x": x.channel("low"), "x2": {"field": "high"}, "stroke": color}),
        _layer("intervals", "point", {**place, "x": x.channel("value"), "fill": color, "tooltip": tooltip}, clip=False),
    ]
    height = {"step": max(14, 30 // max(1, len({one.kind for one in values}) - 1)), "for": "offset"}
    cells: list[list[object]] = [
        [one.category, one.kind, *(f"{number:.4g}" for number in (one.value, one.low, one.high))] for one in values
    ]
    behind = Table(["", "", x.title, "low", "high"], cells, {2, 3, 4})
    return chart({"height": height, "layer": layers}, data, label, behind, zooms=False)


_MARKS: dict[str, Spec] = {
    "rule": {"strokeWidth": 2, "aria": False},
    "text": {
        "align": {"expr": "datum.align"},
        "dx": {"expr": "datum.align === 'left' ? 8 : -8"},
        "dy": {"expr": "datum.down"},
        "fill": "var(--ink)",
        "aria": False,
    },
    "point": {"filled": True, "size": 90, "opacity": 1},
}


def _layer(data: str, mark: str, encoding: Spec, clip: bool = True) -> Spec:
    return {
        "data": {"name": data},
        "mark": {"type": mark, "clip": clip and mark != "text", **_MARKS[mark]},
        "encoding": encoding,
    }


def _around(value: float, error: float | None) -> list[object]:
    return [value - (error or 0.0), value + (error or 0.0)]


def _bounds_x(values: Sequence[Dot]) -> tuple[float, float]:
    places = [place for one in values for place in (one.x - (one.error_x or 0.0), one.x + (one.error_x or 0.0))]
    return min(places), max(places)


def _bounds_y(values: Sequence[Dot]) -> tuple[float, float]:
    places = [place for one in values for place in (one.y - (one.error or 0.0), one.y + (one.error or 0.0))]
    return min(places), max(places)


def _widened(axis: Axis, bounds: tuple[float, float]) -> Axis:
    """The axis with room around values that are all the same."""
    low, high = bounds
    room = 0.12 * (abs(low) or 1.0)
    return axis if high > low else replace(axis, domain=(low - room, high + room))


PHONE_PIXELS, LETTER_PIXELS, LINE_PIXELS, MARGIN, FAR = 260.0, 6.5, 12.0, 24.0, 40.0
"""What a phone leaves a chart, the size of a name on it, the room above and below values, and how far a name goes."""


def named(values: Sequence[Dot], log_x: bool, log_y: bool, height: int) -> list[tuple[str, str, float]]:
    """Return the name that each dot shows, how it is aligned and how far below its dot it stands, in pixels.

    Names stand on the side where there is more room, and below each other where they would overlap on a phone;
    one that would end up far from its dot is empty.
    """
    left, right = _bounds_x(values)
    low, high = _bounds_y(values)
    across = Scale(left, right if right > left else left + (abs(left) or 1.0), 0.0, PHONE_PIXELS, log=log_x)
    upward = Scale(low, high if high > low else low + 1.0, height - MARGIN, MARGIN, log=log_y)
    placed: list[tuple[float, float, float]] = []
    names: dict[int, tuple[str, str, float]] = {}
    for index in sorted(range(len(values)), key=lambda index: -values[index].y):
        one, at = values[index], across(values[index].x)
        width, align = LETTER_PIXELS * len(one.title) + 8, "left" if at <= PHONE_PIXELS / 2 else "right"
        start = at if align == "left" else at - width
        line = own = upward(one.y) - 8
        for begin, end, other in sorted(placed, key=lambda box: box[2]):
            if begin < start + width and start < end and abs(line - other) < LINE_PIXELS:
                line = other + LINE_PIXELS
        near = one.named and line - own <= FAR
        names[index] = (one.title if near else "", align, line - own - 8)
        placed += [(start, start + width, line)] * near
    return [names[index] for index in range(len(values))]
