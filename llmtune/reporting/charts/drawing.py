"""Line charts as inline SVG, drawn once for a wide and once for a narrow screen."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from llmtune.numbers import rate
from llmtune.reporting.charts.image import image
from llmtune.reporting.charts.scales import Scale, linear_range, log_range
from llmtune.reporting.history import Point
from llmtune.reporting.html import Html, join, tag

WIDE, NARROW = (760, 300), (360, 240)
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 40
POINTS, MARKERS = 200, 40


@dataclass(frozen=True)
class Line:
    """A line in a CSS color: thin and pale if it is `faint`, dashed with a marker at each point if it is `marked`."""

    points: list[Point]
    color: str
    title: str
    faint: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines and labeled vertical marks over steps; a `floor` makes the scale logarithmic from there up."""

    lines: list[Line]
    label: str
    marks: list[tuple[float, str]] = field(default_factory=list)
    floor: float = 0.0
    rates: bool = False

    def draw(self) -> Html:
        """Draw the chart twice; the page's style shows the one that fits the screen."""
        return join(_Frame(self, *WIDE).svg("wide"), _Frame(self, *NARROW).svg("narrow"))

    def image(self) -> str:
        """Draw the chart as an SVG file."""
        return image(*WIDE, self.label, *_Frame(self, *WIDE).parts())


class _Frame:
    """One drawing: scales from data to pixels, and the parts in drawing order."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        points = [point for line in chart.lines for point in line.points]
        ys = [y for _, y in points] or [1.0]
        low, high = log_range(chart.floor, ys) if chart.floor else linear_range(ys)
        self.x = Scale(0, max([*(x for x, _ in points), 1]), LEFT, width - RIGHT)
        self.y = Scale(low, high, height - BOTTOM, TOP, log=bool(chart.floor))

    def parts(self) -> list[Html]:
        lines = map(self._path, self.chart.lines)
        return [*self._y_axis(), *self._x_axis(), *self._marks(), *lines, *self._markers()]

    def svg(self, kind: str) -> Html:
        box = f"0 0 {self.width} {self.height}"
        return tag("svg", *self.parts(), viewBox=box, class_=f"chart {kind}", role="img", aria_label=self.chart.label)

    def _y_axis(self) -> Iterable[Html]:
        for value in self.y.ticks(5):
            level = f"{self.y(value):.1f}"
            text = rate(value) if self.chart.rates or 0 < abs(value) < 1e-3 else f"{value:g}"
            yield tag("line", x1=LEFT, x2=self.width - RIGHT, y1=level, y2=level, class_="grid")
            yield tag("text", text, x=LEFT - 8, y=level, dy="0.32em", text_anchor="end")

    def _x_axis(self) -> Iterable[Html]:
        for value in self.x.ticks(self.width // 90):
            if value == int(value):
                at = f"{self.x(value):.1f}"
                yield tag("text", f"{value:,.0f}", x=at, y=self.height - BOTTOM + 18, text_anchor="middle")
        yield tag("text", "step", x=self.width - RIGHT, y=self.height - 4, text_anchor="end", class_="quiet")

    def _marks(self) -> Iterable[Html]:
        for value, label in self.chart.marks:
            if value <= self.x.high:
                at = f"{self.x(value):.1f}"
                if value > 0:
                    yield tag("line", x1=at, x2=at, y1=TOP - 4, y2=self.height - BOTTOM, class_="mark")
                yield tag("text", label, x=at, y=TOP - 9, dx=0 if value == 0 else 3, class_="quiet")

    def _path(self, line: Line) -> Html:
        pieces: list[str] = []
        pen = "M"
        for x, y in thin(line.points):
            if y <= 0 and self.y.log:
                pen = "M"
                continue
            pieces.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        kind = "faint" if line.faint else "marked" if line.marked else None
        return tag("path", tag("title", line.title), d="".join(pieces), style=f"stroke:{line.color}", class_=kind)

    def _markers(self) -> Iterable[Html]:
        """Dots at the points of marked lines that are few, and where a line is but one point."""
        for line in self.chart.lines:
            few = line.points if line.marked and len(line.points) <= MARKERS else line.points[-1:]
            for x, y in few if line.marked or len(line.points) == 1 else []:
                if y > 0 or not self.y.log:
                    title = tag("title", f"{line.title}: {y:.4g} at step {x:,}")
                    at = {"cx": f"{self.x(x):.1f}", "cy": f"{self.y(y):.1f}"}
                    yield tag("circle", title, r=5 if line.marked else 3, style=f"fill:{line.color}", **at)


def ramp(share: float) -> str:
    """Return the CSS color of a distance at `share` (0 output, 1 embeddings) of the way down the model."""
    return f"color-mix(in oklab, var(--far) {100 * share:.0f}%, var(--near))"


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
