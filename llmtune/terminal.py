"""What commands print: data findings, the plan table, the final summary; plain text where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llmtune.files import read_json
from llmtune.numbers import count, size
from llmtune.plan.table import PlanTable
from llmtune.run import Run

console = Console(highlight=False, soft_wrap=True)


def heading(name: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{name}[/bold]")


def prepared(run: Run) -> None:
    """Print what was found in a run's data, and its plan."""
    findings(read_json(run.data_file))
    plan(PlanTable.read(run.plan_file))


def plan(table: PlanTable) -> None:
    """The plan table: per stage, the distances that train, tensors, parameters and rates."""
    console.print(
        f"\n[bold]plan[/bold]  {table.method}, adapter {table.adapter}, on {table.base.name}: "
        f"{table.blocks} blocks, {count(table.parameters)} parameters, "
        f"{count(table.trained)} ever trained, {table.steps:,} steps",
        markup=True,
    )
    if table.adapted:
        console.print(f"adapts {sum(table.adapted.values())} layers: {', '.join(table.adapted)}", markup=False)
    if table.quantized:
        console.print(f"puts {table.quantized} linear layers that never train into 4 bits")
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
        f"take {size(table.states_bytes)}, activations come on top"
    )
    for note in table.notes:
        console.print(note, markup=False)


def findings(found: dict[str, Any]) -> None:
    """What the data gate found, one line a finding."""
    console.print("[bold]data[/bold]")
    for line in found["notes"]:
        console.print(line, markup=False)
    console.print(f"a row, with what is learned between \u27e6 and \u27e7:\n{found['example']}", markup=False)


def summary(run: Run) -> None:
    """The last words of a run: the table on held-out rows, where everything lies, what to type next."""
    if run.done("eval"):
        from llmtune.evaluate.step import table

        listed = table(run)
        rows = Table(box=None, pad_edge=False)
        for title in listed[0]:
            rows.add_column(title, justify="left" if title == "model" else "right")
        for row in listed:
            rows.add_row(*row.values())
        console.print("\n[bold]held-out rows[/bold]")
        console.print(rows)
    console.print()
    for name, path, done in (
        ("delta", run.delta, run.done("train")),
        ("merged", run.merged, run.done("merge")),
        ("report", run.report_file, run.done("report")),
    ):
        if done:
            console.print(f"{name:7} {path}")
    console.print(f"\nnext: llmtune chat {run.path}")
