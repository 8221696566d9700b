"""launch: a training on several machines, and the job that SLURM runs."""

import sys
from pathlib import Path
from typing import Any

from llmtune.cli.options import (
    Account,
    Address,
    GpusPerNode,
    Json,
    Nodes,
    Out,
    Partition,
    Port,
    Rank,
    RecipeFile,
    Script,
    Set,
    Slurm,
    TimeLimit,
    Verbose,
)
from llmtune.cli.output import results, tell_notes
from llmtune.cli.shipped import refuse_existing
from llmtune.errors import FieldError, RecipeError
from llmtune.files import write_text
from llmtune.launch.cluster.machines import Machines, read_machines
from llmtune.launch.cluster.slurm import Request, Work, slurm_job
from llmtune.recipe.sections import Recipe
from llmtune.run import Run


def launch(
    recipe: RecipeFile,
    slurm: Slurm = False,
    script: Script = None,
    rank: Rank = None,
    address: Address = None,
    port: Port = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    time: TimeLimit = None,
    partition: Partition = None,
    account: Account = None,
    set: Set = None,
    out: Out = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train on several machines, or write a job for SLURM."""
    _refuse_mixture(
        slurm,
        job={"-o": script, "--time": time, "--partition": partition, "--account": account},
        part={"--rank": rank, "--address": address, "--port": port},
    )
    settings = Recipe.load(recipe, set or [])
    tell_notes(settings)
    try:
        machines = read_machines(settings.launch, nodes, gpus_per_node)
    except FieldError as error:
        raise settings.located(error) from error
    run = out or Path("runs") / recipe.stem
    with results(as_json) as give:
        if slurm:
            file = script or Path("job.sbatch")
            refuse_existing(file)
            work = Work(Path.cwd(), sys.executable, recipe, run, tuple(set or []))
            chosen = (nodes, gpus_per_node) != (None, None)
            write_text(file, slurm_job(work, machines, Request(recipe.stem, time, partition, account), chosen))
            facts = {"script": file, "nodes": machines.count, "gpus_per_node": machines.gpus, "run": run}
            give(facts, lambda: print(f"wrote {file}; next: sbatch {file}"))
        else:
            _train_part(settings, machines, Run(run), (rank, address, port))
            give({"run": run, "rank": rank}, lambda: None)


def _refuse_mixture(slurm: bool, job: dict[str, Any], part: dict[str, Any]) -> None:
    """Raise RecipeError for options of a job without --slurm, of one machine's part with it, or for neither."""
    misplaced = [name for name, value in (part if slurm else job).items() if value is not None]
    if misplaced:
        kind = "one machine's part, and --slurm writes a job" if slurm else "a job; add --slurm"
        raise RecipeError(f"{misplaced[0]}: is for {kind}")
    if not slurm:
        missing = [name for name in ("--rank", "--address") if part[name] is None]
        if missing:
            raise RecipeError(f"{' and '.join(missing)}: missing; --slurm writes a job for a cluster instead")


def _train_part(settings: Recipe, machines: Machines, run: Run, place: tuple[Any, ...]) -> None:
    from llmtune.launch.cluster.node import PORT, Place, check_place, train_node

    rank, address, port = place
    here = Place(rank, address, port or PORT)
    try:
        check_place(machines, here, settings.launch)
        train_node(settings, machines, here, run)
    except FieldError as error:
        raise settings.located(error) from error
