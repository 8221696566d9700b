"""A training on several machines: what it takes, one machine's part, and the job for SLURM."""

import re
import socket
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from llmtune.cli import main
from llmtune.errors import MachineError
from llmtune.launch.cluster import node
from llmtune.launch.cluster.machines import Machines, read_machines
from llmtune.launch.cluster.node import Place, run_node
from llmtune.launch.cluster.slurm import Request, Work, slurm_job
from llmtune.launch.command import WORLD
from llmtune.launch.ending import Exit
from llmtune.machine.gpus import Gpus
from llmtune.recipe.sections import Launch
from tests.support import ROOT, slurm
from tests.support.recipes import GOOD, write

WORK = Work(Path("/shared/work"), "/shared/llmtune/.venv/bin/python", Path("recipe.yaml"), Path("runs/recipe"))
TASK = """#!/bin/bash
# What `python -P -m llmtune` is in a job: it notes its words, and ends a training as the test says.
echo "${@:4}" >> calls
case $4 in
  launch) [[ -n $CHECKPOINT ]] && mkdir -p "$RUN/checkpoints/$CHECKPOINT"; exit "$CODE" ;;
esac
"""


def section(accelerate: str, processes: int | None = None) -> Launch:
    """The launch section of a recipe."""
    return Launch.model_validate({"accelerate": accelerate, "processes": processes})


@pytest.mark.parametrize(
    ("accelerate", "processes", "nodes", "gpus", "expected"),
    [
        ("multi_node", None, None, None, Machines(2, 8, 8)),
        ("multi_node", None, 4, None, Machines(4, 8, 8)),
        ("multi_node", None, 4, 2, Machines(4, 2, 2)),
        ("multi_node", 12, 3, None, Machines(3, 4, 4)),
        ("auto", None, None, None, Machines(1, 1, 1)),
        ("auto", 4, None, 8, Machines(1, 8, 8)),
        ("ddp", 4, 1, None, Machines(1, 4, 4)),
        ("multi_cpu", 3, None, None, Machines(1, 3, 0)),
    ],
)
def test_takes_machines_of_the_recipe_or_as_told(
    accelerate: str, processes: int | None, nodes: int | None, gpus: int | None, expected: Machines
) -> None:
    assert read_machines(section(accelerate, processes), nodes, gpus) == expected


def test_starts_one_machines_share_as_accelerate_understands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str], bool]] = []

    def execute(arguments: list[str], env: dict[str, str], launcher: bool) -> Exit:
        started.append((arguments, env, launcher))
        return Exit(0)

    monkeypatch.setattr(node, "execute", execute)
    monkeypatch.setattr(node, "find_gpus", lambda: Gpus(8))
    launch, machines = section("multi_node"), Machines(4, 2, 2)
    run_node(launch, machines, Place(3, "10.0.0.7", 1234), ["recipe.yaml"])
    ((words, environment, launcher),) = started
    assert launcher
    assert environment[WORLD] == "8"
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[3:]))
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (4, 8, 3)
    assert (parsed.main_process_ip, parsed.main_process_port, parsed.rdzv_backend) == ("10.0.0.7", 1234, "static")
    assert parsed.rdzv_conf == "timeout=900"
    assert (parsed.training_script, parsed.training_script_args) == ("llmtune.train", ["recipe.yaml"])
    monkeypatch.setattr(node, "find_gpus", lambda: Gpus(1))
    with pytest.raises(MachineError, match="multi_node needs 2 GPUs and this machine has 1"):
        run_node(launch, machines, Place(3, "10.0.0.7", 1234), ["recipe.yaml"])
    with pytest.raises(MachineError, match=r"--address no\.such\.host\.invalid: this machine knows no such host"):
        run_node(launch, machines, Place(3, "no.such.host.invalid", 1234), ["recipe.yaml"])
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(MachineError, match=f"port {port} of this machine is in use; give another with --port"):
            run_node(launch, machines, Place(0, "10.0.0.7", port), ["recipe.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--slurm", "--nodes", "2"],
            "recipe.yaml:4: launch.accelerate: ddp is for one machine, not for --nodes 2; try m",
        ),
        (["--slurm", "--set", "launch.accelerate=multi_node", "--nodes", "1"], "is for 2 machines, not for --nodes 1"),
        (
            ["--slurm", "--set=launch.accelerate=multi_node", "--set=launch.processes=15"],
            "not divisible by 2 machines; t",
        ),
        (["--slurm", "--set", "launch.accelerate=multi_cpu", "--gpus-per-node", "2"], "--gpus-per-node 2: launch.acc"),
        (["--slurm", "--time", "12h"], "--time '12h': is no time limit; try 12:00:00"),
        (
            ["--slurm", "--partition", "gpu\n#SBATCH --x"],
            "--partition 'gpu\\n#SBATCH --x': is no name that SLURM takes",
        ),
        (["--slurm", "-o", "there.sbatch"], "there.sbatch: exists already and is not overwritten; choose another name"),
        (["--slurm", "--rank", "0"], "--rank: is for one machine's part, and --slurm writes a job"),
        (["--rank", "0", "--address", "a", "--time", "5"], "--time: is for a job; add --slurm"),
        (["--rank", "0"], "--address: missing; --slurm writes a job for a cluster instead"),
        (["--rank", "0", "--address", "a"], "recipe.yaml:4: launch.accelerate: ddp is for one machine: llmtune run"),
        (
            ["--rank", "2", "--address", "a", "--set", "launch.accelerate=multi_node"],
            "--rank 2: the 2 machines are 0 to 1",
        ),
    ],
)
def test_refuses_what_no_cluster_can_run_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD + "launch: {accelerate: ddp}\n")
    (tmp_path / "there.sbatch").touch()
    before = sorted(tmp_path.iterdir())
    assert main(["launch", "recipe.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmtune: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_example_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    recipe = write(tmp_path, GOOD + "launch: {accelerate: multi_node}\n").name
    assert main(["launch", recipe, "--slurm", "--time", "12:00:00"]) == 0
    assert capsys.readouterr().out == "wrote job.sbatch; next: sbatch job.sbatch\n"
    text = (tmp_path / "job.sbatch").read_text()
    assert "hf_secret" not in text
    machines = Machines(2, 8, 8)
    example = slurm_job(WORK, machines, Request("recipe", "12:00:00"))
    assert (ROOT / "launch" / "slurm.sbatch").read_text() == example
    places = re.compile(r"^(cd -- |python=).*$", re.MULTILINE)
    assert places.sub("", text) == places.sub("", example)


@pytest.mark.parametrize("machines", [Machines(2, 8, 8), Machines(3, 2, 0), Machines(1, 1, 1), Machines(1, 2, 0)])
def test_a_job_asks_for_its_machines_a_signal_and_a_second_start(machines: Machines) -> None:
    odd = Work(Path("/a b/it's"), "/p y/python", Path("re$c.yaml"), Path("r u n"), ("a.b=c d",))
    job = slurm_job(odd, machines, Request("a b/é", "90", "gpu,big", "me@lab"), chosen=True)
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)
    asked = re.findall(r"^#SBATCH (\S+)$", job, re.MULTILINE)
    assert len(asked) == job.count("#SBATCH")
    assert {f"--nodes={machines.count}", "--ntasks-per-node=1", "--signal=TERM@120", "--requeue"} < set(asked)
    assert {"--time=90", "--partition=gpu,big", "--account=me@lab", "--job-name=llmtune-a-b--"} < set(asked)
    assert (f"--gpus-per-node={machines.gpus}" in asked) == bool(machines.gpus)
    assert ("--exclusive" in asked) == (machines.count > 1)
    assert (f"--nodes {machines.count}" in job) == (machines.count > 1)


@pytest.mark.parametrize(
    ("code", "checkpoint", "requeued", "calls"),
    [
        (0, "step-000002", False, 3),
        (143, "step-000002", True, 2),
        (130, "step-000002", True, 2),
        (143, "", False, 2),
        (4, "step-000002", False, 2),
    ],
)
def test_a_stopped_job_is_queued_again_and_a_failed_one_is_not(
    tmp_path: Path, code: int, checkpoint: str, requeued: bool, calls: int
) -> None:
    programs = slurm.install(tmp_path / "bin", srun=slurm.SRUN, scontrol=slurm.SCONTROL, python=TASK)
    (tmp_path / "runs" / "r" / "checkpoints" / "step-000001").mkdir(parents=True)
    work = Work(tmp_path, str(programs / "python"), Path("r.yaml"), Path("runs/r"), ("train.epochs=2",))
    job = slurm_job(work, Machines(2, 8, 8), Request("r"))
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        **{"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"},
        **{"CODE": str(code), "CHECKPOINT": checkpoint, "RUN": "runs/r"},
    }
    ended = subprocess.run(["bash"], input=job, text=True, env=environment, cwd=tmp_path, check=False)
    assert ended.returncode == code
    assert (tmp_path / "requeued").is_file() == requeued
    lines = sorted((tmp_path / "calls").read_text().splitlines())
    assert len(lines) == calls
    part = "launch r.yaml --set=train.epochs=2 --out runs/r --address 127.0.0.1 --port 20077 --rank"
    assert [line.strip() for line in lines[:2]] == [f"{part} 0", f"{part} 1"]
    assert [line.strip() for line in lines[2:]] == ["run runs/r"] * (calls - 2)
