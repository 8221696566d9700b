"""What commands print: data findings, the plan table, the final summary; plain text outside a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmtune.files import read_json
from llmtune.numbers import count, size
from llmtune.plan.table import PlanTable
from llmtune.run import Run
from llmtune.storage.urls import stored_at
from llmtune.working import use_stdout

console = Console(highlight=False, soft_wrap=True)
_PIPE_WIDTH = 200
"""Columns of a table that goes into a file or another program."""


def heading(name: str) -> None:
    """Print the name of the step that begins; stdout holds progress from now on."""
    use_stdout()
    console.print(f"\n[bold]{name}[/bold]")


def prepared(run: Run) -> None:
    """Print the findings on a run's data, and its plan."""
    findings(read_json(run.data_file))
    plan(PlanTable.read(run.plan_file))


def plan(table: PlanTable) -> None:
    """The plan table: per stage, the distances that train, tensors, parameters and rates."""
    console.print(
        f"\n[bold]plan[/bold]  {table.in_words or table.method} on {table.base.name} "
        f"(method.kind {table.method}, adapter {table.adapter}): "
        f"{table.blocks} blocks, {count(table.parameters)} parameters, "
        f"{count(table.trained)} ever trained, {table.steps:,} steps",
        markup=True,
    )
    if table.adapted:
        console.print(f"adapts {sum(table.adapted.values())} layers: {', '.join(table.adapted)}", markup=False)
    if table.quantized:
        console.print(f"{table.quantized} linear layers that never train are in {table.bits or 4} bits")
    rows = Table(box=None, pad_edge=False)
    for title in ("stage", "steps", "trains"):
        rows.add_column(title)
    for title in ("tensors", "parameters", "rate (top .. bottom)"):
        rows.add_column(title, justify="right")
    for number, stage in enumerate(table.stages, 1):
        words = (stage.steps_in_words, stage.trains.words(table.blocks))
        rows.add_row(str(number), *words, str(stage.count_tensors), count(stage.trained), stage.rates_in_words)
    console.print(rows)
    console.print(
        f"the delta will be {size(table.delta_bytes)}; weights, gradients and optimizer state "
        f"take {size(table.states_bytes)}"
    )
    for note in table.notes:
        console.print(note, markup=False)


def plain(lines: list[str]) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, markup=False)


def rows(cells: list[dict[str, str]]) -> None:
    """Print rows of cells by column title, the first column at the left."""
    _table(cells, {next(iter(cells[0]))} if cells else set())


def findings(data: dict[str, Any]) -> None:
    """Print what the checks found in the data, one line a finding, and one row as the model reads it."""
    console.print("[bold]data[/bold]")
    for note in data["notes"]:
        console.print(note, markup=False)
    example = f"one row; the model learns the text between \u27e6 and \u27e7:\n{data['example']}"
    console.print(with_shown_marks(example, console.encoding), markup=False)


def with_shown_marks(text: str, encoding: str) -> str:
    """Write the marks around what the model learns as [[ and ]] where the encoding has no others."""
    try:
        "\u27e6\u27e7".encode(encoding)
    except (UnicodeError, LookupError):
        return text.replace("\u27e6", "[[").replace("\u27e7", "]]")
    return text


def scores(run: Run) -> None:
    """Print the results of the evaluation, a row for each model, and their differences."""
    from llmtune.evaluation.tables import comparison_note, difference_table, forgetting_lines, table, task_table

    results = table(run)
    console.print(f"\n[bold]{'held-out rows' if 'n' in results[0] else 'results'}[/bold]")
    _table(results, {"model"})
    if note := comparison_note(run):
        console.print(note, markup=False)
    if tasks := task_table(run):
        console.print("\n[bold]public tasks[/bold]")
        _table(tasks, {"task"})
    console.print("\n[bold]tuned minus base, on the same rows[/bold]")
    _table(difference_table(run), {"tuned against", "metric", "verdict"})
    for line in forgetting_lines(run):
        console.print(line, markup=False)


def summary(run: Run) -> None:
    """Print the results of the evaluation, the paths of delta, merged weights and report, and the next command."""
    if run.done("eval"):
        scores(run)
    console.print()
    for name, path, done in (
        ("delta", run.delta, run.done("train")),
        ("merged", run.merged, run.done("merge")),
        ("report", run.report_file, run.done("report")),
    ):
        if done:
            console.print(f"{name:7} {path}")
    console.print(f"\nnext: llmtune chat {stored_at(run.path) or run.path}")


def _table(rows: list[dict[str, str]], left: set[str]) -> None:
    """Print rows of cells by column title; columns not in `left` are aligned at the right."""
    shown = Table(box=None, pad_edge=False)
    for title in rows[0] if rows else ():
        shown.add_column(escape(title), justify="left" if title in left else "right")
    for row in rows:
        shown.add_row(*map(escape, row.values()))
    if not console.is_terminal:  # then rich takes 80 columns, and would wrap the cells
        console.width = _PIPE_WIDTH
    console.print(shown)
