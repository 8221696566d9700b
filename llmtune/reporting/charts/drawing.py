"""Lines as a picture of their own: an SVG file for a model card, where no script runs."""

from collections.abc import Iterable

from llmtune.numbers import rate
from llmtune.reporting.charts.image import image
from llmtune.reporting.charts.lines import Line, Lines, thin
from llmtune.reporting.charts.scales import Scale, linear_range, log_floor, log_range
from llmtune.reporting.html import Html, tag

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 40
MARKERS = 40


def line_picture(lines: Lines) -> str:
    """Draw lines as an SVG file."""
    return image(WIDTH, HEIGHT, lines.label, *_Frame(lines).parts())


class _Frame:
    """One drawing: scales from data to pixels, and the parts in drawing order."""

    def __init__(self, chart: Lines) -> None:
        self.chart = chart
        points = [point for line in chart.lines for point in line.points]
        ys = [y for _, y in points] or [1.0]
        low, high = log_range(log_floor(ys), ys) if chart.y.log else linear_range(ys)
        self.x = Scale(0, max([*(x for x, _ in points), 1]), LEFT, WIDTH - RIGHT)
        self.y = Scale(low, high, HEIGHT - BOTTOM, TOP, log=chart.y.log)

    def parts(self) -> list[Html]:
        lines = map(self._path, self.chart.lines)
        return [*self._y_axis(), *self._x_axis(), *self._marks(), *lines, *self._markers()]

    def _y_axis(self) -> Iterable[Html]:
        for value in self.y.ticks(5):
            level = f"{self.y(value):.1f}"
            text = rate(value) if 0 < abs(value) < 1e-3 else f"{value:g}"
            yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid")
            yield tag("text", text, x=LEFT - 8, y=level, dy="0.32em", text_anchor="end")

    def _x_axis(self) -> Iterable[Html]:
        for value in self.x.ticks(WIDTH // 90):
            if value == int(value):
                at = f"{self.x(value):.1f}"
                yield tag("text", f"{value:,.0f}", x=at, y=HEIGHT - BOTTOM + 18, text_anchor="middle")
        yield tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end", class_="quiet")

    def _marks(self) -> Iterable[Html]:
        for value, label in self.chart.marks:
            if value <= self.x.high:
                at = f"{self.x(value):.1f}"
                if value > 0:
                    yield tag("line", x1=at, x2=at, y1=TOP - 4, y2=HEIGHT - BOTTOM, class_="mark")
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
