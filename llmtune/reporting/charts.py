"""Line charts as inline SVG, drawn once for a wide and once for a narrow screen."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmtune.numbers import rate
from llmtune.reporting.html import Html, join, tag

Point = tuple[float, float]

WIDE, NARROW = (760, 300), (360, 240)
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 40
POINTS = 200


@dataclass(frozen=True)
class Line:
    """A line in a CSS color, thin and pale if it is `faint`."""

    points: list[Point]
    color: str
    title: str
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines, dots, and labeled vertical marks; a `floor` makes the scale logarithmic from there up."""

    lines: list[Line]
    label: str
    dots: list[tuple[Point, str]] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    floor: float = 0.0
    rates: bool = False

    def draw(self) -> Html:
        """Draw the chart twice; the page's style shows the one that fits the screen."""
        return join(_Frame(self, *WIDE).svg("wide"), _Frame(self, *NARROW).svg("narrow"))


class _Frame:
    """One drawing: scales from data to pixels, and the parts in drawing order."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        points = [point for line in chart.lines for point in line.points] + [point for point, _ in chart.dots]
        ys = [y for _, y in points] or [1.0]
        self.right = max((x for x, _ in points), default=1.0)
        self.low, self.high = _log_range(chart.floor, ys) if chart.floor else _range(ys)

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * value / max(self.right, 1e-12)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.chart.floor:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)

    def svg(self, kind: str) -> Html:
        parts = [*self._y_axis(), *self._x_axis(), *self._marks(), *map(self._path, self.chart.lines), *self._dots()]
        box = f"0 0 {self.width} {self.height}"
        return tag("svg", *parts, viewBox=box, class_=f"chart {kind}", role="img", aria_label=self.chart.label)

    def _y_axis(self) -> Iterable[Html]:
        for value in decades(self.low, self.high) if self.chart.floor else ticks(self.low, self.high, 5):
            level = f"{self.y(value):.1f}"
            text = rate(value) if self.chart.rates else f"{value:g}"
            yield tag("line", x1=LEFT, x2=self.width - RIGHT, y1=level, y2=level, class_="grid")
            yield tag("text", text, x=LEFT - 8, y=level, dy="0.32em", text_anchor="end")

    def _x_axis(self) -> Iterable[Html]:
        for value in ticks(0, self.right, self.width // 90):
            if value == int(value):
                at = f"{self.x(value):.1f}"
                yield tag("text", f"{value:,.0f}", x=at, y=self.height - BOTTOM + 18, text_anchor="middle")
        yield tag("text", "step", x=self.width - RIGHT, y=self.height - 4, text_anchor="end", class_="quiet")

    def _marks(self) -> Iterable[Html]:
        for value, label in self.chart.marks:
            at = f"{self.x(value):.1f}"
            if value > 0:
                yield tag("line", x1=at, x2=at, y1=TOP - 4, y2=self.height - BOTTOM, class_="mark")
            yield tag("text", label, x=at, y=TOP - 9, dx=0 if value == 0 else 3, class_="quiet")

    def _path(self, line: Line) -> Html:
        pieces: list[str] = []
        pen = "M"
        for x, y in thin(line.points):
            if y <= 0 and self.chart.floor:
                pen = "M"
                continue
            pieces.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        title = tag("title", line.title)
        return tag(
            "path", title, d="".join(pieces), style=f"stroke:{line.color}", class_="faint" if line.faint else None
        )

    def _dots(self) -> Iterable[Html]:
        for (x, y), label in self.chart.dots:
            yield tag("circle", tag("title", label), cx=f"{self.x(x):.1f}", cy=f"{self.y(y):.1f}", r=4)


def ramp(share: float) -> str:
    """Return the CSS color of a distance at `share` (0 output, 1 embeddings) of the way down the model."""
    return f"color-mix(in oklab, var(--far) {100 * share:.0f}%, var(--near))"


def thin(points: list[Point]) -> list[Point]:
    """Return at most POINTS of the points, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (POINTS - 1))] for index in range(POINTS)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values (1, 2 or 5 times a power of ten apart) from low to high."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high, at most seven."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**power for power in range(last, first - 1, -every)]


def _range(ys: list[float]) -> Point:
    low, high = min(ys), max(ys)
    low = 0.0 if 0 <= low < 0.5 * high else low
    step = (high - low or abs(high) or 1.0) * 0.05
    return (low if low == 0 else low - step, high + step)


def _log_range(floor: float, ys: list[float]) -> Point:
    low, high = 10.0 ** math.floor(math.log10(floor)), 10.0 ** math.ceil(math.log10(max(ys)) - 1e-9)
    return (low, high) if low < high else (high / 10, high)
