"""Lines over steps or time, which a page draws with Vega-Lite and a model card as a picture."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

from llmtune.reporting.charts.axes import STEPS, Axis
from llmtune.reporting.charts.chart import Data, Spec, Table, chart, zooming
from llmtune.reporting.charts.scales import linear_range, log_floor, log_range
from llmtune.reporting.history import Point
from llmtune.reporting.html import Html, tag

POINTS = 200
"""A line is drawn through so many points at most."""


@dataclass(frozen=True)
class Line:
    """A line in a CSS color: thin and pale if it is `faint`, with a marker at each point if it is `marked`,
    and dashed then but where it is `solid`.
    """

    points: list[Point]
    color: str
    title: str
    faint: bool = False
    marked: bool = False
    solid: bool = False


@dataclass(frozen=True)
class Lines:
    """Lines over one axis, with labeled vertical marks on it."""

    lines: list[Line]
    label: str
    y: Axis
    x: Axis = STEPS
    marks: list[tuple[float, str]] = field(default_factory=list)
    height: int = 260

    def draw(self) -> Html:
        """Draw the lines, with each value under the pointer and behind the chart."""
        shown = [line for line in self.lines if line.points]
        points = [(key, line.title, x, y) for key, line in enumerate(shown) for x, y in thin(line.points)]
        rows: list[list[object]] = [
            [key, title, x, None if self.y.log and y <= 0 else y] for key, title, x, y in points
        ]
        data = {"lines": Data(["key", "line", "x", "y"], rows), "marks": Data(["x", "label"], [*map(list, self.marks)])}
        drawn = (self._line(key, line) for key, line in enumerate(shown))
        dots = [self._dots(key, line) for key, line in enumerate(shown) if line.marked or len(line.points) == 1]
        layers = [*self._marks(), *drawn, *dots, {**self._targets(), "params": zooming()}]
        return chart({"height": self.height, "layer": layers}, data, self.label, self._table(shown))

    def _at(self) -> Spec:
        return {"x": self._x().channel("x"), "y": self._y().channel("y")}

    def _x(self) -> Axis:
        """The axis with room for a marker at its ends."""
        places = [x for line in self.lines for x, _ in line.points] or [1.0]
        low, high = 0.0 if self.x.from_zero else min(places), max(places)
        if self.x.log:
            room = (high / low) ** 0.012 if high > low else 2.0
            return replace(self.x, domain=(low / room, high * room))
        room = 0.012 * (high - low or 1.0)
        return replace(self.x, domain=(low if self.x.from_zero else low - room, high + room))

    def _y(self) -> Axis:
        """The axis around the values, with room for the names of marks above them."""
        if self.y.domain:
            return self.y
        values = [y for line in self.lines for _, y in line.points] or [1.0]
        low, high = log_range(log_floor(values), values) if self.y.log else linear_range(values)
        if self.marks:
            high = high * (high / low) ** 0.1 if self.y.log else high + 0.1 * (high - low)
        return replace(self.y, domain=(low, high))

    def _line(self, key: int, line: Line) -> Spec:
        looks: Spec = {"strokeWidth": 1, "opacity": 0.4} if line.faint else {"strokeWidth": 2}
        looks |= {"strokeDash": [7, 4]} if line.marked and not line.solid else {}
        mark = {"type": "line", "clip": True, "description": line.title, "stroke": line.color, **looks}
        return {**_only(key), "mark": mark, "encoding": self._at()}

    def _dots(self, key: int, line: Line) -> Spec:
        """Markers at the points of a marked line, and where a line is but one point."""
        mark = {"type": "point", "clip": True, "filled": True, "size": 70, "opacity": 1, "fill": line.color}
        return {**_only(key), "mark": {**mark, "aria": False}, "encoding": self._at()}

    def _targets(self) -> Spec:
        """Points that nobody sees and the pointer finds: they show the values of a line."""
        mark = {"type": "point", "clip": True, "filled": True, "size": 160, "opacity": 0, "aria": False}
        tooltip = [{"field": "line", "title": "line"}, self.x.tip("x"), self.y.tip("y")]
        return {"data": {"name": "lines"}, "mark": mark, "encoding": {**self._at(), "tooltip": tooltip}}

    def _marks(self) -> list[Spec]:
        if not self.marks:
            return []
        rows, at = {"data": {"name": "marks"}}, {"x": self._x().channel("x")}
        rule = {"type": "rule", "clip": True, "stroke": "var(--quiet)", "strokeDash": [3, 3], "opacity": 0.7}
        text = {"type": "text", "aria": False, "align": "left", "dx": 4, "fill": "var(--quiet)"}
        top = {"y": {"value": 8}, "text": {"field": "label"}}
        return [{**rows, "mark": rule, "encoding": at}, {**rows, "mark": text, "encoding": {**at, **top}}]

    def _table(self, lines: list[Line]) -> Table:
        values = [dict(thin(line.points)) for line in lines]
        places = sorted({x for one in values for x in one})
        cells: list[list[object]] = [
            [f"{x:,g}", *(f"{one[x]:.4g}" if x in one else None for one in values)] for x in places
        ]
        return Table([self.x.title, *(line.title for line in lines)], cells, set(range(len(lines) + 1)))


def _only(key: int) -> Spec:
    return {"data": {"name": "lines"}, "transform": [{"filter": {"field": "key", "equal": key}}]}


def ramp(share: float) -> str:
    """Return the CSS color of a distance at `share` (0 output, 1 embeddings) of the way down the model."""
    return f"color-mix(in oklab, var(--far) {100 * share:.0f}%, var(--near))"


def legend(keys: list[tuple[str, str]]) -> Html:
    """List the colors of a chart with what they stand for."""
    return tag("p", *(key(color, text) for color, text in keys), class_="legend")


def key(color: str, text: str, kind: str | None = None) -> Html:
    """Show a color with what it stands for."""
    return tag("span", tag("i", style=f"background:{color}", class_=kind), text)


def thin(points: list[Point]) -> list[Point]:
    """Return at most POINTS of the points: the first, the last, and the lowest and highest of each span between."""
    if len(points) <= POINTS:
        return points
    inner, spans = points[1:-1], POINTS // 2 - 1
    ends = [round(index * len(inner) / spans) for index in range(spans + 1)]
    kept = [points[0]]
    for start, end in pairwise(ends):
        span = inner[start:end]
        kept += sorted({min(span, key=lambda point: point[1]), max(span, key=lambda point: point[1])})
    return [*kept, points[-1]]
