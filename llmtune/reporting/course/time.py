"""The report on time: what was predicted before the first step beside what was measured."""

from llmtune.numbers import duration
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.bars import Bar, bars
from llmtune.reporting.charts.lines import legend
from llmtune.reporting.course.memory import COLORS
from llmtune.reporting.history import History
from llmtune.reporting.html import Html, section, table
from llmtune.reporting.values import number

_NOTE = (
    "Of the training alone, without start-up and evaluation. Predicted on CPUs by the rate of this machine's matrix "
    "products, on a GPU by the rate that its maker states."
)


def time_section(history: History) -> Html | None:
    """Show predicted beside measured time; None where nothing was predicted."""
    records = [
        (predicted, measured)
        for record in history.others
        if (predicted := number(record.get("predicted_seconds"))) is not None
        and (measured := number(record.get("measured_seconds"))) is not None
    ]
    if not records:
        return None
    predicted, measured = records[-1]
    unit, size = ("minutes", 60) if max(predicted, measured) >= 120 else ("seconds", 1)
    pairs = (("predicted", predicted), ("measured", measured))
    drawn = [Bar("training", kind, value / size, duration(value), COLORS[kind]) for kind, value in pairs]
    label = f"Time of the training: predicted {duration(predicted)}, measured {duration(measured)}"
    share = f"{measured / predicted:.0%}" if predicted else None
    row: list[object] = [duration(predicted), duration(measured), share]
    return section(
        "Time",
        legend([(color, kind) for kind, color in COLORS.items()]),
        bars(drawn, label, Axis(unit)),
        table(["predicted", "measured", "of the prediction"], [row], {0, 1, 2}),
        note=_NOTE,
    )
