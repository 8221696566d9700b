"""Measured values with their errors: over another quantity, such as quality over minutes, or beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.chart import Data, Spec, Table, chart, zooming
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
    rows: list[list[object]] = [
        [one.title, one.x, one.y, *_around(one.y, one.error), *_around(one.x, one.error_x), one.color] for one in values
    ]
    data = {"dots": Data(["name", "x", "y", "low", "high", "left", "right", "color"], rows)}
    at: Spec = {"x": x.channel("x"), "y": y.channel("y")}
    color = {"field": "color", "type": "nominal", "scale": None}
    tooltip = [{"field": "name", "title": "name"}, x.tip("x"), y.tip("y")]
    layers = [
        _layer("dots", "rule", {"x": at["x"], "y": y.channel("low"), "y2": {"field": "high"}, "stroke": color}),
        _layer("dots", "rule", {"y": at["y"], "x": x.channel("left"), "x2": {"field": "right"}, "stroke": color}),
        _layer("dots", "text", {**at, "text": {"field": "name"}}),
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
        _layer("intervals", "point", {**place, "x": x.channel("value"), "fill": color, "tooltip": tooltip}),
    ]
    height = {"step": max(14, 30 // max(1, len({one.kind for one in values}) - 1)), "for": "offset"}
    cells: list[list[object]] = [
        [one.category, one.kind, *(f"{number:.4g}" for number in (one.value, one.low, one.high))] for one in values
    ]
    behind = Table(["", "", x.title, "low", "high"], cells, {2, 3, 4})
    return chart({"height": height, "layer": layers}, data, label, behind, zooms=False)


_MARKS: dict[str, Spec] = {
    "rule": {"strokeWidth": 2, "aria": False},
    "text": {"align": "left", "dx": 8, "dy": -8, "fill": "var(--ink)", "aria": False},
    "point": {"filled": True, "size": 90, "opacity": 1},
}


def _layer(data: str, mark: str, encoding: Spec) -> Spec:
    return {
        "data": {"name": data},
        "mark": {"type": mark, "clip": mark != "text", **_MARKS[mark]},
        "encoding": encoding,
    }


def _around(value: float, error: float | None) -> list[object]:
    return [value - (error or 0.0), value + (error or 0.0)]
