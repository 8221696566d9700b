"""The job that SLURM runs: one task a machine trains, the first machine does the rest, and a stopped job goes on."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import RecipeError
from llmtune.launch.cluster.machines import Machines

_NAME = re.compile(r"[\w.,@:+-]+", re.ASCII)
"""A partition, or several with commas, or an account."""
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
_CORES = 4
"""CPU cores for each process."""
WARNING = 120
"""Seconds before the time limit at which training is told to stop."""
_JOB = """#!/bin/bash
# {count}; written by `llmtune launch --slurm`. Submit it with: sbatch FILE
{directives}

# {warning} seconds before its time limit SLURM sends SIGTERM to what srun started, and to nothing else. Training then
# writes a checkpoint after its step and ends; the job goes back into the queue and goes on from there. Where a step
# and its checkpoint take longer, raise the seconds in --signal.

# The environment and these paths are the same on every machine, as on a shared disk.
cd -- {folder} || exit 3
python={python}
recipe={recipe}
run={run}
settings=({settings})

# What is done so far. A job that was stopped and did nothing more than the last one would be stopped again.
progress() {{
  ls -- "$run/checkpoints" 2>/dev/null
  cksum "$run/manifest.json" 2>/dev/null
}}
before=$(progress)

end() {{
  if [[ $1 == 130 || $1 == 143 ]]; then
    if [[ $(progress) != "$before" ]]; then
      echo "stopped with a checkpoint, and queued again"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "stopped before anything more was done: raise --time" >&2
    fi
  fi
  exit "$1"
}}

{steps}
"""
_SEVERAL = """first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# A machine that fails ends the others. One that is done before them ends none.
srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=none bash -c 'exec "$@" --rank "$SLURM_NODEID"' task \\
  "$python" -P -m llmtune launch "$recipe" "${settings[@]}" --out "$run" \\
  --address "$first" --port "$port"COUNTS || end $?

# Evaluation, merge and what else the recipe asks for.
srun --nodes=1 --ntasks=1 --cpu-bind=none "$python" -P -m llmtune run "$run" || end $?"""
_ALONE = """srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=none \\
  "$python" -P -m llmtune run "$recipe" "${settings[@]}" --out "$run" || end $?"""


@dataclass(frozen=True)
class Request:
    """What a job asks of SLURM beside machines: its name, a time limit, a partition and an account, where given."""

    name: str
    time: str | None = None
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for option, value in (("partition", self.partition), ("account", self.account)):
            if value is not None and not _NAME.fullmatch(value):
                raise RecipeError(
                    f"--{option} {value!r}: is no name that SLURM takes; `sinfo` and `sacctmgr` show them"
                )
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise RecipeError(
                f"--time {self.time!r}: is no time limit; try 12:00:00, 2-00:00:00, or minutes such as 90"
            )


@dataclass(frozen=True)
class Work:
    """What a job runs: the folder that relative paths start from, the Python of the environment, recipe and run."""

    folder: Path
    python: str
    recipe: Path
    run: Path
    settings: tuple[str, ...] = ()


def slurm_job(work: Work, machines: Machines, request: Request, chosen: bool = False) -> str:
    """The text of a job for sbatch; with `chosen` machines, they are named to each of them too."""
    counts = f" --nodes {machines.count}" + (f" --gpus-per-node {machines.gpus}" if machines.gpus else "")
    several = _SEVERAL.replace("COUNTS", f" \\\n {counts}" if chosen else "")
    return _JOB.format(
        count=_in_words(machines),
        directives="\n".join(f"#SBATCH {words}" for words in _directives(machines, request)),
        warning=WARNING,
        folder=shlex.quote(str(work.folder)),
        python=shlex.quote(work.python),
        recipe=shlex.quote(str(work.recipe)),
        run=shlex.quote(str(work.run)),
        settings=shlex.join(f"--set={override}" for override in work.settings),
        steps=several if machines.count > 1 else _ALONE,
    )


def _in_words(machines: Machines) -> str:
    kind = "GPU" if machines.gpus else "process"
    number = machines.gpus or machines.processes
    plural = "" if number == 1 else "s" if machines.gpus else "es"
    where = "one machine" if machines.count == 1 else f"{machines.count} machines, each"
    return f"{where} with {number} {kind}{plural}"


def _directives(machines: Machines, request: Request) -> list[str]:
    """The options of sbatch: several machines are taken whole, one as far as the job needs it."""
    name = re.sub(r"[^\w.-]", "-", request.name, flags=re.ASCII)
    whole = ["--exclusive", "--mem=0"]
    part = [f"--cpus-per-task={_CORES * machines.processes}"]
    return [
        f"--job-name=llmtune-{name}",
        f"--nodes={machines.count}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={machines.gpus}"] if machines.gpus else []),
        *(whole if machines.count > 1 else part),
        *([f"--time={request.time}"] if request.time else []),
        *([f"--partition={request.partition}"] if request.partition else []),
        *([f"--account={request.account}"] if request.account else []),
        "--output=%x-%j.out",
        "--open-mode=append",
        f"--signal=TERM@{WARNING}",
        "--requeue",
    ]
