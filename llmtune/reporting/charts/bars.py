"""Bars in pairs, such as predicted and measured, in a row for each category."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.chart import Data, Spec, Table, chart
from llmtune.reporting.html import Html


@dataclass(frozen=True)
class Bar:
    """A value of one of several kinds in a category; `text` is the value as people write it."""

    category: str
    kind: str
    value: float
    text: str
    color: str = "var(--tuned)"


def bars(values: Sequence[Bar], label: str, x: Axis) -> Html:
    """Draw a bar for each value from zero on, those of a category one below another, with their values in words."""
    rows: list[list[object]] = [[one.category, one.kind, one.value, one.text, one.color] for one in values]
    data = {"bars": Data(["category", "kind", "value", "text", "color"], rows)}
    x = replace(x, domain=(0.0, 1.25 * max([one.value for one in values], default=1.0) or 1.0))
    place: Spec = {
        "y": {"field": "category", "type": "nominal", "sort": None, "axis": {"title": None}},
        "yOffset": {"field": "kind", "sort": None},
        "x": x.channel("value"),
    }
    color = {"field": "color", "type": "nominal", "scale": None}
    tooltip = [{"field": name, "title": name} for name in ("category", "kind")]
    tooltip += [{"field": "text", "title": x.title}]
    named = {"name": "bars"}
    text = {"type": "text", "align": "left", "dx": 5, "fill": "var(--ink)", "aria": False}
    layers = [
        {
            "data": named,
            "mark": {"type": "bar", "cornerRadiusEnd": 2},
            "encoding": {**place, "fill": color, "tooltip": tooltip},
        },
        {"data": named, "mark": text, "encoding": {**place, "text": {"field": "text"}}},
    ]
    kinds = [*dict.fromkeys(one.kind for one in values)]
    height = {"step": 18, "for": "offset"}
    by_category: dict[str, dict[str, str]] = {}
    for one in values:
        by_category.setdefault(one.category, {})[one.kind] = one.text
    cells: list[list[object]] = [[name, *(texts.get(kind) for kind in kinds)] for name, texts in by_category.items()]
    behind = Table(["", *kinds], cells, set(range(1, len(kinds) + 1)))
    return chart({"height": height, "layer": layers}, data, label, behind, zooms=False)
