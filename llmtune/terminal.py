"""What commands print: data findings, the plan table, the final summary; plain text where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from llmtune.files import read_json
from llmtune.numbers import quantity
from llmtune.run import Run

console = Console(highlight=False, soft_wrap=True)


def heading(name: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{name}[/bold]")


def prepared(run: Run) -> None:
    """Print what was found in a run's data, and its plan."""
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
