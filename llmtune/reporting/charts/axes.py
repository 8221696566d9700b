"""Axes of charts: what they measure, and how their numbers are written."""

from dataclasses import dataclass

from llmtune.reporting.charts.chart import Spec

RATE = ".2~e"
"""The format of learning rates, whose zero is 0."""


@dataclass(frozen=True)
class Axis:
    """What an axis measures, and how its numbers are written; a scale by logarithm where `log`."""

    title: str
    format: str | None = None
    """As d3 writes formats; None for what suits the numbers."""
    log: bool = False
    from_zero: bool = False
    domain: tuple[float, float] | None = None
    padding: int = 0
    """Pixels between the outermost values and the ends of the axis."""

    def channel(self, name: str) -> Spec:
        """Return the encoding of a field of numbers on this axis."""
        scale: Spec = {"type": "log"} if self.log else {"zero": self.from_zero}
        scale |= {"domain": list(self.domain)} if self.domain else {"padding": self.padding}
        axis: Spec = {"title": self.title} | ({"format": self.format} if self.format else {})
        axis |= {"labelExpr": f"datum.value ? format(datum.value, '{RATE}') : '0'"} if self.format == RATE else {}
        return {"field": name, "type": "quantitative", "scale": {**scale, "nice": False}, "axis": axis}

    def tip(self, name: str) -> Spec:
        """Return what a tooltip says of a field on this axis."""
        return {"field": name, "title": self.title, "format": self.format or ".4~r"}


STEPS = Axis("step", ",d", from_zero=True)
