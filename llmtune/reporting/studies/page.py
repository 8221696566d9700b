"""The page of a search, which opens offline."""

import math
from collections.abc import Iterable

from llmtune import __version__
from llmtune.numbers import duration, rate
from llmtune.reporting.charts.axes import RATE, Axis
from llmtune.reporting.charts.dots import Dot, dots
from llmtune.reporting.charts.lines import Line, Lines, key
from llmtune.reporting.charts.scales import needs_log
from llmtune.reporting.document import document
from llmtune.reporting.html import Html, facts, section, table, tag
from llmtune.searching.record import SearchRecord, TrialRecord

_STATES = {"pruned": "ended early", "failed": "failed"}
BEST, OTHER, EARLY = "var(--tuned)", "var(--valid)", "var(--quiet)"


def render(record: SearchRecord) -> str:
    """Return the page of a search."""
    best = next(one for one in record["trials"] if one["number"] == record["best"])
    name = record["recipe"].rpartition("/")[2]
    body = [
        tag("h1", f"Search for the best values of {name}"),
        tag("p", f"{record['method']} on {record['base'].rpartition('/')[2]}", class_="lede"),
        _summary(record, best),
        *(_key_section(record, key) for key in record["over"]),
        _curves(record),
        _trials(record),
        _next_section(record),
        tag("footer", f"Written by llmtune {__version__}. This page is one file and loads nothing."),
    ]
    return document(f"{name}: a search by llmtune", body)


def _summary(record: SearchRecord, best: TrialRecord) -> Html:
    states = [one["state"] for one in record["trials"]]
    counted = f"{len(states)}, of which {states.count('pruned')} were ended early and {states.count('failed')} failed"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in record["importance"].items())
    pairs: list[tuple[str, object]] = [(name, _text(value)) for name, value in best["values"].items()]
    pairs += [("validation loss", f"{best['loss']:.4f}"), ("trials", counted), ("time", duration(record["seconds"]))]
    return section("The best values", facts([*pairs, ("explains the losses", shares or None)]))


def _key_section(record: SearchRecord, name: str) -> Html | None:
    """Show the loss by the values of one key: over an axis for numbers, in a table for words."""
    tried = [one for one in record["trials"] if one["loss"] is not None and name in one["values"]]
    values = [one["values"][name] for one in tried]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return section(f"Loss by {name}", _by_word(tried, name))
    is_log = name in record["log"] or needs_log(map(float, values))
    axis = Axis(name, RATE if is_log else None, log=is_log, padding=24)
    shown = [
        Dot(
            f"trial {one['number']}",
            float(one["values"][name]),
            one["loss"] or 0.0,
            color=_color(record, one),
            named=one["number"] == record["best"],
        )
        for one in tried
    ]
    best = next(one for one in tried if one["number"] == record["best"])
    label = f"Validation loss by {name}: lowest, {best['loss']:.4g}, at {_text(best['values'][name])}"
    drawn = dots(shown, label, axis, _loss_axis(one.y for one in shown))
    return section(f"Loss by {name}", _legend("dot"), drawn, note="Each mark is a trial.")


def _by_word(tried: list[TrialRecord], name: str) -> Html:
    """List the lowest loss of each value of a key whose values are words."""
    groups: dict[str, list[float]] = {}
    for one in tried:
        groups.setdefault(_text(one["values"][name]), []).append(one["loss"] or 0.0)
    rows: list[list[object]] = [[text, len(some), f"{min(some):.4f}"] for text, some in groups.items()]
    return table([name, "trials", "lowest loss"], sorted(rows, key=lambda row: str(row[2])), {1, 2})


def _curves(record: SearchRecord) -> Html | None:
    """Show the validations of every trial over its steps."""
    lines = [
        Line(
            [(point["step"], point["loss"]) for point in one["curve"]],
            _color(record, one),
            f"trial {one['number']}",
            faint=one["number"] != record["best"],
        )
        for one in record["trials"]
    ]
    if not any(line.points for line in lines):
        return None
    label = f"Validation loss by step of {len(lines)} trials; trial {record['best']} ends lowest"
    axis = _loss_axis(loss for line in lines for _, loss in line.points)
    return section("Losses while they trained", _legend(), Lines(lines, label, axis).draw())


def _loss_axis(losses: Iterable[float]) -> Axis:
    return Axis("validation loss", log=needs_log(losses), padding=24)


def _trials(record: SearchRecord) -> Html:
    keys = list(record["over"])
    rows: list[list[object]] = [
        [
            one["number"],
            *(_text(one["values"].get(key, "")) for key in keys),
            None if one["loss"] is None else f"{one['loss']:.4f}",
            duration(one["seconds"]),
            "best" if one["number"] == record["best"] else one.get("reason") or _STATES.get(one["state"]),
        ]
        for one in sorted(record["trials"], key=lambda one: math.inf if one["loss"] is None else one["loss"])
    ]
    head: list[object] = ["trial", *keys, "loss", "time", ""]
    shown = table(head, rows, {0, len(keys) + 1, len(keys) + 2}, {len(keys) + 3})
    return section("Trials", shown, note="The lowest loss first; a loss of a trial that was ended early is its last.")


def _next_section(record: SearchRecord) -> Html:
    commands = [f"llmtune run {record['winner']}", f"optuna-dashboard {record['study']}"]
    return section("Next", tag("pre", tag("code", "\n".join(commands)), tabindex=0))


def _legend(kind: str | None = None) -> Html:
    """Say what colors mean; `kind` is the shape of their samples."""
    keys = ((BEST, "the best"), (OTHER, "to its end"), (EARLY, "ended early"))
    return tag("p", *(key(color, text, kind) for color, text in keys), class_="legend")


def _color(record: SearchRecord, one: TrialRecord) -> str:
    if one["number"] == record["best"]:
        return BEST
    return OTHER if one["state"] == "complete" else EARLY


def _text(value: object) -> str:
    if isinstance(value, float):
        return rate(value) if 0 < abs(value) < 1e-2 else f"{value:.4g}"
    return str(value)
