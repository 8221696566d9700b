"""What commands print: data findings, the plan table, the final summary; plain text outside a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llmtune.files import read_json
from llmtune.numbers import count as quantity
from llmtune.run import Run

console = Console(highlight=False, soft_wrap=True)


def heading(name: str) -> None:
    """Print the name of the step that begins."""
    console.print(f"\n[bold]{name}[/bold]")


def prepared(run: Run) -> None:
    """Print the findings on a run's data, and its plan."""
    findings(read_json(run.data_file))
    plan(read_json(run.plan_file))


def plan(table: dict[str, Any]) -> None:
    """The plan table: per stage, the distances that train, tensors, parameters and rates."""
    base = table["base"]
    console.print(
        f"\n[bold]plan[/bold]  {table['method']}, adapter {table['adapter']}, on {base['name']}: "
        f"{table['blocks']} blocks, {quantity(table['parameters'])} parameters, "
        f"{quantity(table['trained'])} ever trained, {table['steps']} steps",
        markup=True,
    )
    if table.get("adapted"):
        console.print(f"adapts {sum(table['adapted'].values())} layers: {', '.join(table['adapted'])}", markup=False)
    if table.get("quantized"):
        console.print(f"puts {table['quantized']} linear layers that never train into 4 bits")
    rows = Table(box=None, pad_edge=False)
    for title, side in (("stage", "left"), ("steps", "left"), ("distance", "left"), ("tensors", "right")):
        rows.add_column(title, justify=side)  # type: ignore[arg-type]
    for title in ("parameters", "rate (top .. bottom)"):
        rows.add_column(title, justify="right")
    for index, stage in enumerate(table["stages"], 1):
        far = max(map(int, stage["rates"]))
        near = min(map(int, stage["rates"]))
        rates = f"{stage['rates'][str(near)]:.2g} .. {stage['rates'][str(far)]:.2g}"
        span = f"{stage['start'] + 1}-{stage['end']}"
        tensors = str(sum(stage["tensors"].values()))
        rows.add_row(str(index), span, f"{near} .. {far}", tensors, quantity(stage["trained"]), rates)
    console.print(rows)
    console.print(
        f"the delta will be {table['delta_bytes'] / 1e6:.1f} MB; weights, gradients and optimizer state "
        f"take {table['states_bytes'] / 1e9:.2f} GB, activations come on top"
    )
    for note in table["notes"]:
        console.print(note, markup=False)


def findings(data: dict[str, Any]) -> None:
    """Print what the checks found in the data, one line a finding, and one row as the model reads it."""
    console.print("[bold]data[/bold]")
    for note in data["notes"]:
        console.print(note, markup=False)
    console.print(f"one row; the model learns the text between \u27e6 and \u27e7:\n{data['example']}", markup=False)


def summary(run: Run) -> None:
    """Print the results of the evaluation, the paths of delta, merged weights and report, and the next command."""
    if run.done("eval"):
        from llmtune.evaluate.results import table

        results = table(run)
        shown = Table(box=None, pad_edge=False)
        for title in results[0]:
            shown.add_column(title, justify="left" if title == "model" else "right")
        for row in results:
            shown.add_row(*row.values())
        console.print("\n[bold]held-out rows[/bold]")
        console.print(shown)
    console.print()
    for name, path, done in (
        ("delta", run.delta, run.done("train")),
        ("merged", run.merged, run.done("merge")),
        ("report", run.report_file, run.done("report")),
    ):
        if done:
            console.print(f"{name:7} {path}")
    console.print(f"\nnext: llmtune chat {run.path}")
