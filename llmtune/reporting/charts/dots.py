"""Measured values with their errors: over another quantity, such as quality over minutes, or beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.chart import Data, Spec, Table, chart, zooming
from llmtune.reporting.charts.names import ASIDE, Mark, Name, place_names
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
    names = _names(values, x, y, height)
    rows: list[list[object]] = [
        [
            one.title,
            one.x,
            one.y,
            *_around(one.y, one.error),
            *_around(one.x, one.error_x),
            one.color,
            name.text,
            name.align,
            name.down,
        ]
        for one, name in zip(values, names, strict=True)
    ]
    columns = ["name", "x", "y", "low", "high", "left", "right", "color", "label", "align", "down"]
    led = [row for row, name in zip(rows, names, strict=True) if name.leads]
    data = {"dots": Data(columns, rows), "led": Data(columns, led)}
    at: Spec = {"x": x.channel("x"), "y": y.channel("y")}
    color = {"field": "color", "type": "nominal", "scale": None}
    tooltip = [{"field": "name", "title": "name"}, x.tip("x"), y.tip("y")]
    layers = [
        _layer("dots", "rule", {"x": at["x"], "y": y.channel("low"), "y2": {"field": "high"}, "stroke": color}),
        _layer("dots", "rule", {"y": at["y"], "x": x.channel("left"), "x2": {"field": "right"}, "stroke": color}),
        _layer("led", "leader", {**at, "x2": {"field": "x"}, "y2": {"field": "y"}}),
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


_ASIDE = {"expr": f"datum.align === 'left' ? {ASIDE} : {-ASIDE}"}
_MARKS: dict[str, Spec] = {
    "rule": {"type": "rule", "strokeWidth": 2, "aria": False},
    "leader": {
        "type": "rule",
        "x2Offset": _ASIDE,
        "y2Offset": {"expr": "datum.down"},
        "stroke": "var(--quiet)",
        "aria": False,
    },
    "text": {
        "type": "text",
        "align": {"expr": "datum.align"},
        "baseline": "middle",
        "dx": _ASIDE,
        "dy": {"expr": "datum.down"},
        "fill": "var(--ink)",
        "aria": False,
    },
    "point": {"type": "point", "filled": True, "size": 90, "opacity": 1},
}


def _layer(data: str, mark: str, encoding: Spec, clip: bool = True) -> Spec:
    return {
        "data": {"name": data},
        "mark": {"clip": clip and mark not in ("text", "leader"), **_MARKS[mark]},
        "encoding": encoding,
    }


def _around(value: float, error: float | None) -> tuple[float, float]:
    return value - (error or 0.0), value + (error or 0.0)


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


PHONE_PIXELS = 260.0
"""What a phone leaves a chart."""


def _names(values: Sequence[Dot], x: Axis, y: Axis, height: int) -> list[Name]:
    """Return the name beside each dot; one that is not to be named has none."""
    across, down = _scale(x, _bounds_x(values), 0.0, PHONE_PIXELS), _scale(y, _bounds_y(values), height, 0.0)
    marks = [
        Mark(one.title if one.named else "", across(one.x), down(one.y), down(high), down(low))
        for one, (low, high) in ((one, _around(one.y, one.error)) for one in values)
    ]
    return place_names(marks, PHONE_PIXELS, height)


def _scale(axis: Axis, bounds: tuple[float, float], start: float, end: float) -> Scale:
    """Pixels of values between bounds, as Vega-Lite lays an axis out."""
    if axis.domain:
        return Scale(*axis.domain, start, end, log=axis.log)
    room = axis.padding if end > start else -axis.padding
    return Scale(*bounds, start + room, end - room, log=axis.log)
