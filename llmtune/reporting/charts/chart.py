"""A chart on a page: a Vega-Lite specification, the data it draws, and the same numbers as text and as a table."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llmtune.reporting.html import Html, fold, table, tag
from llmtune.reporting.values import number

Item = TypeVar("Item")
Spec = dict[str, Any]
"""A Vega-Lite specification, or a part of one."""

LISTED_ROWS = 60
"""A table behind a chart has so many rows at most."""


@dataclass(frozen=True)
class Data:
    """Rows of a chart under the names of their columns; a number that is not finite is drawn as a gap."""

    columns: list[str]
    rows: list[list[object]]

    def packed(self) -> dict[str, object]:
        """Return what a page stores: each name once, numbers to seven digits."""
        return {"columns": self.columns, "rows": [[_packed(value) for value in row] for row in self.rows]}


@dataclass(frozen=True)
class Table:
    """What a reader sees in place of a chart: titles, rows, and which columns hold numbers."""

    head: list[object]
    rows: list[list[object]]
    numeric: set[int]


def chart(spec: Spec, data: dict[str, Data], label: str, behind: Table, zooms: bool = True) -> Html:
    """Draw a specification, whose layers name their rows as `{"data": {"name": ...}}`.

    `label` says in words what the chart shows: it is read aloud, and stands there where scripts do not run.
    A specification that zooms holds the selection `zoom`; see `zooming`.
    """
    content = {"spec": {**spec, "description": label}, "data": {name: one.packed() for name, one in data.items()}}
    keys = "Keys: plus and minus zoom, arrows move, 0 shows all." if zooms else None
    plot = {"class_": "plot", "tabindex": 0, "role": "group", "aria_label": f"Chart. {keys}" if keys else "Chart."}
    return tag(
        "figure",
        tag("div", **plot),
        tag("script", Html(script_safe(json.dumps(content, allow_nan=False))), type="application/json"),
        tag("noscript", tag("p", f"{label}. Charts need JavaScript; the table holds the numbers.", class_="note")),
        tag("div", *map(_button, _BUTTONS), class_="zoom", hidden="hidden") if zooms else None,
        fold("Show as table", *_listed(behind)),
        class_="drawn",
    )


_BUTTONS = (("in", "+", "Zoom in"), ("out", "\u2212", "Zoom out"), ("reset", "Show all", None))


def _button(button: tuple[str, str, str | None]) -> Html:
    action, text, label = button
    return tag("button", text, type="button", data_zoom=action, aria_label=label)


def script_safe(text: str) -> str:
    """Return JSON that nothing in it can end: neither a script element nor a line of it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def zooming(*channels: str) -> list[Spec]:
    """Return the selection by which a chart is moved and zoomed along its channels (x and y by default).

    The wheel zooms only with Ctrl or Meta held, so that a page still scrolls over its charts.
    """
    wheel = "wheel![event.ctrlKey || event.metaKey]"
    select = {"type": "interval", "encodings": list(channels or ("x", "y")), "zoom": wheel}
    return [{"name": "zoom", "select": select, "bind": "scales"}]


def _packed(value: object) -> object:
    if isinstance(value, float):
        finite = number(value)
        return None if finite is None else float(f"{finite:.7g}")
    return value


def _listed(behind: Table) -> list[Html | None]:
    rows = evenly(behind.rows, LISTED_ROWS)
    left = len(behind.rows) - len(rows)
    note = tag("p", f"{len(rows)} of {len(behind.rows):,} rows, evenly spaced.", class_="note") if left else None
    return [note, table(behind.head, [list(row) for row in rows], behind.numeric)]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` items, evenly spaced from the first to the last, or all where they are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / max(1, count - 1))] for index in range(count)]
