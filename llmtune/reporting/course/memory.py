"""The report on memory: what was predicted for each stage beside what was measured."""

from llmtune.numbers import size
from llmtune.reporting.charts.axes import Axis
from llmtune.reporting.charts.bars import Bar, bars
from llmtune.reporting.charts.lines import legend
from llmtune.reporting.history import History
from llmtune.reporting.html import Html, join, section, table
from llmtune.reporting.values import number, whole
from llmtune.run_log import Record

COLORS = {"predicted": "var(--base)", "measured": "var(--tuned)"}
_ON_GPU = "In bytes that tensors took on the device, and that torch held."
_ON_CPU = (
    "The resident set beyond what the process held before it loaded the base. On CPUs, where layers keep less, the"
)
_BOUND = "prediction is above it in most runs."


def memory_section(history: History) -> Html | None:
    """Show a row a stage; None where nothing was measured."""
    records = [record for record in history.others if number(record.get("predicted")) is not None]
    if not records:
        return None
    on_cpu = any(number(record.get("resident")) is not None for record in records)
    titles: list[object] = ["stage", "predicted", "measured", "of the prediction", *([] if on_cpu else ["reserved"])]
    note = f"{_ON_CPU} {_BOUND}" if on_cpu else _ON_GPU
    rows = [_row(record, on_cpu) for record in records]
    return section("Memory", _bars(records, on_cpu), table(titles, rows, {1, 2, 3, 4}), note=note)


def _bars(records: list[Record], on_cpu: bool) -> Html:
    """Draw predicted beside measured memory, a pair of bars for each stage."""
    values, words = [], []
    for record in records:
        stage = f"stage {whole(record.get('stage')) or 1}"
        pairs = (("predicted", number(record.get("predicted"))), ("measured", _measured(record, on_cpu)))
        known = [(kind, value) for kind, value in pairs if value is not None]
        values += [Bar(stage, kind, value / 1e9, size(value), COLORS[kind]) for kind, value in known]
        words.append(f"{stage} {', '.join(f'{kind} {size(value)}' for kind, value in known)}")
    return join(
        legend([(color, kind) for kind, color in COLORS.items()]),
        bars(values, f"Memory: {'; '.join(words)}", Axis("GB")),
    )


def _row(record: Record, on_cpu: bool) -> list[object]:
    predicted = number(record.get("predicted")) or 0.0
    measured = _measured(record, on_cpu)
    share = None if measured is None or not predicted else f"{measured / predicted:.0%}"
    row: list[object] = [whole(record.get("stage")), size(predicted), _size(measured), share]
    return row if on_cpu else [*row, _size(number(record.get("reserved")))]


def _size(value: float | None) -> str | None:
    return None if value is None else size(value)


def _measured(record: Record, on_cpu: bool) -> float | None:
    return number(record.get("resident" if on_cpu else "allocated"))
