"""llmtune beside other tools: the same rows, order, batches, steps and seed, each run in processes of its own.

`make bench` is laid out for 45 minutes on two cores, `make bench BENCH=full` for some hours. Interrupted, the same
command goes on where it was. Results are kept for each machine; `python -m benchmarks.tables` writes them into the
documents.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arms import ARMS
from benchmarks.bases import SHIPPED
from benchmarks.cells import REPEATS, SIZES, TOOLS, WORK, Cell, Planned, Work, choose_cells, plan_runs, tools_of
from benchmarks.contest import ROOT, Contest, gemm_rate, make_contest, run_tool
from benchmarks.pace import Pace
from benchmarks.store import Store, default_file, describe, group_of, machine
from benchmarks.summary import summarize
from benchmarks.tables import of_machine
from llmtune.files import read_json
from llmtune.numbers import duration

LLAMAFACTORY = ROOT / "build" / "llamafactory" / "bin" / "python"
"""The interpreter of the virtual environment that `make bench-llamafactory` makes."""


def absolute(path: str) -> Path:
    """A path from the root: tools run in folders of their own."""
    return Path(path).absolute()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the bench's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", nargs="?", default="default", choices=list(REPEATS), help="which runs are made")
    parser.add_argument("--only", nargs="+", default=[], metavar="SIZE/ROWS/ARM", help="these cells alone")
    parser.add_argument("--sizes", nargs="+", default=[], choices=SIZES, help="cells of these models alone")
    parser.add_argument("--rows", nargs="+", default=[], choices=list(WORK), help="those with rows of so many tokens")
    parser.add_argument("--arms", nargs="+", default=[], choices=list(ARMS), help="those of these arms")
    parser.add_argument("--tools", nargs="+", default=[], choices=TOOLS, help="these tools alone")
    parser.add_argument("--repeats", type=int, help="runs of each tool on each cell (1; 3 in the full set)")
    parser.add_argument("--steps", type=int, help="optimizer steps of an epoch, on every cell")
    parser.add_argument("--batch", type=int, help="rows of a step, on every cell")
    parser.add_argument("--model", default=SHIPPED, help="another base in place of the smallest")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--llamafactory", type=absolute, default=LLAMAFACTORY, metavar="PYTHON",
                        help="the interpreter of a virtual environment that has LLaMA-Factory")  # fmt: skip
    parser.add_argument("--work", type=absolute, default=ROOT / "build" / "bench", help="a folder for models and runs")
    parser.add_argument("--out", type=Path, help="the file of results (one for each machine in benchmarks/results)")
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace, llamafactory: bool) -> list[Planned]:
    """All runs that the options ask for, in their order."""
    cells = choose_cells(options.set, options.only, options.sizes, options.rows, options.arms)
    tools = {cell: tools_of(cell, options.set, options.tools, llamafactory) for cell in cells}
    return plan_runs(cells, tools, options.repeats or REPEATS[options.set])


def contest_of(options: argparse.Namespace, cell: Cell) -> Contest:
    """What is trained in a cell under the options."""
    work = Work(options.batch or cell.work.batch, options.steps or cell.work.steps)
    return make_contest(cell, work, options.model, options.precision, options.work / "models")


def llamafactory_version(interpreter: Path) -> str | None:
    """The version of LLaMA-Factory that an interpreter has; None where there is none."""
    words = "import importlib.metadata as m; print(m.version('llamafactory'))"
    if not interpreter.is_file():
        return None
    answer = subprocess.run([interpreter, "-c", words], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are left and print the tables; gives 1 where a run failed or trained something else."""
    options = parse(arguments)
    others = {"model": SHIPPED, "precision": "bf16", "steps": None, "batch": None}
    changed = next((name for name, usual in others.items() if getattr(options, name) != usual), None)
    if changed and not options.out:
        raise SystemExit(f"--{changed}: such results go to a file of their own; name it with --out")
    version = llamafactory_version(options.llamafactory)
    if version is None:
        wanted = any(tool.startswith("llamafactory") for tool in options.tools)
        if wanted or options.llamafactory != LLAMAFACTORY:
            raise SystemExit(
                f"{options.llamafactory}: has no LLaMA-Factory; `make bench-llamafactory` makes one that has"
            )
        say("LLaMA-Factory is left out: `make bench-llamafactory` installs it, or name its --llamafactory PYTHON")
    store = Store(options.out or default_file())
    planned = plan(options, version is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the tool that runs, as Ctrl-C does
    try:
        make(planned, options, store, version or "")
    except KeyboardInterrupt:
        say(f"stopped; what is done is in {store.file}, and the same command goes on from there")
        return 130
    return report(store, planned)


def make(planned: Sequence[Planned], options: argparse.Namespace, store: Store, version: str) -> None:
    """Make the runs that are not made yet, and say how long the rest will take."""
    runs = [(run, contest_of(options, run.cell)) for run in planned]
    own = {run: version if run.tool.startswith("llamafactory") else "" for run, _ in runs}
    left = [pair for pair in runs if not store.done(pair[0], group_of(pair[1].settings), own[pair[0]])]
    say(f"{describe(machine())}: {len(runs)} runs, {len(runs) - len(left)} of them done before")
    pace = Pace(store.runs, gemm_rate(torch.bfloat16 if options.precision == "bf16" else torch.float32))
    for place, (run, contest) in enumerate(left):
        say(f"{place + 1}/{len(left)} {run.cell.name} {run.tool}; about {duration(pace.left(left[place:]))} left")
        interpreter = str(options.llamafactory) if own[run] else sys.executable
        figures = run_tool(contest, run.tool, interpreter, options.work)
        kept = store.add(run, group_of(contest.settings), own[run], figures)
        if "error" in kept:
            say(f"  failed: {kept['error']}")
            continue
        pace.learn(run, contest, kept["wall_s"])
        say(f"  {kept['seconds_per_step']:.3f} s a step, {kept['wall_s']:.1f} s in all, {kept['peak_rss_mb']:.0f} MiB")


def report(store: Store, planned: Sequence[Planned]) -> int:
    """Print this machine's tables; gives 1 where a run of these failed or trained something else, else 0."""
    print(of_machine(read_json(store.file)))
    names = {(run.cell.name, run.tool) for run in planned}
    rows = [row for row in summarize(store.runs) if (f"{row['size']}/{row['rows']}/{row['arm']}", row["tool"]) in names]
    bad = [row for row in rows if row["failed"] or "wrong" in row]
    for row in bad:
        name = f"{row['size']}/{row['rows']}/{row['arm']} {row['tool']}"
        say(f"{name}: {'WRONG: ' + row['wrong'] if 'wrong' in row else 'failed: ' + row['error']}")
    return int(bool(bad))


def say(line: str) -> None:
    """Tell on stderr how the bench goes on."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
