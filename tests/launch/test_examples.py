"""The examples of launch/: scripts that bash reads, and commands that their programs take."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llmtune.cli.app import build
from tests.support import ROOT, slurm

FOLDER = ROOT / "launch"
TASK_KEYS = {"name", "workdir", "num_nodes", "resources", "volumes", "envs", "secrets", "setup", "run"}
"""The keys of SkyPilot's tasks (0.14) that the example uses."""


def task() -> dict[str, Any]:
    """SkyPilot's task."""
    return dict(yaml.safe_load((FOLDER / "skypilot.yaml").read_text()))


def calls(tmp_path: Path, script: str, *words: str, **environment: str) -> list[list[str]]:
    """The commands, with their words, that a script runs; the programs of the examples are recorders."""
    names = ("llmtune", "torchrun", "hf", "pip", "srun", "scontrol")
    programs = slurm.install(tmp_path / "bin", **dict.fromkeys(names, slurm.RECORDER))
    file = tmp_path / "calls"
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(file), **environment}
    subprocess.run(["bash", "-c", script, "script", *words], env=variables, cwd=tmp_path, check=True)
    return [json.loads(line) for line in file.read_text().splitlines()]


def parse(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words after `llmtune`."""
    group: Any = typer.main.get_command(build())
    context = group.make_context("llmtune", list(words))
    name, command, rest = group.resolve_command(context, list(words))
    return dict(command.make_context(name, rest, parent=context).params)


def test_bash_reads_every_script() -> None:
    scripts = [*(file.read_text() for file in sorted(FOLDER.glob("*.s*"))[:3]), task()["setup"], task()["run"]]
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert all(os.access(file, os.X_OK) for file in FOLDER.glob("*.sh"))


def test_torchrun_takes_the_command_of_its_example(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    train, finish = calls(tmp_path, (FOLDER / "torchrun.sh").read_text(), "my recipe.yaml", "RUN", "2")
    parsed = get_args_parser().parse_args(train[1:])
    assert (train[0], parsed.nproc_per_node, parsed.module) == ("torchrun", "2", True)
    assert (parsed.training_script, parsed.training_script_args) == (
        "llmtune.train",
        ["my recipe.yaml", "--out", "RUN"],
    )
    assert finish == ["llmtune", "run", "RUN"]
    assert parse(finish[1:])["recipe"] == Path("RUN")


def test_hf_jobs_takes_the_command_of_its_example_and_the_bucket_keeps_the_run(tmp_path: Path) -> None:
    from huggingface_hub.cli.jobs import jobs_cli

    script = (FOLDER / "hf-jobs.sh").read_text()
    ((program, *words),) = calls(tmp_path, script, "my job", "me/llmtune:cuda", "me/runs", "one", DRY_RUN="1")
    assert (program, words[:3]) == ("hf", ["jobs", "run", "--dry-run"])
    job = jobs_cli.commands["run"].make_context("run", words[2:]).params
    assert list(job["secrets"]) == ["HF_TOKEN"]
    assert list(job["volume"]) == ["my job:/job", "hf://buckets/me/runs:/runs"]
    assert job["image"] == "me/llmtune:cuda"
    for place in ("job", "runs"):
        (tmp_path / place).mkdir()
    # The work itself, with a run that writes a file and fails.
    programs = slurm.install(tmp_path / "bin", llmtune='#!/bin/bash\nmkdir -p "$4"; echo new >> "$4/log"; exit 4\n')
    work = re.sub(r"/(tmp/run|runs|job)\b", rf"{tmp_path}/\1", job["command"][-1])
    for count in (1, 2):
        (tmp_path / "tmp").mkdir()
        variables = {"PATH": f"{programs}:/usr/bin:/bin", "NAME": "one"}
        assert subprocess.run(["bash", "-c", work], env=variables, check=False).returncode == 4
        assert (tmp_path / "runs" / "one" / "log").read_text() == "new\n" * count
        subprocess.run(["rm", "-r", str(tmp_path / "tmp")], check=True)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_skypilot_starts_each_machines_part(tmp_path: Path, rank: str) -> None:
    example = task()
    assert set(example) == TASK_KEYS
    assert example["secrets"] == {"HF_TOKEN": None}
    assert set(example["resources"]) == {"infra", "accelerators"}
    volume = yaml.safe_load((FOLDER / "skypilot-volume.yaml").read_text())
    assert example["volumes"] == {"/shared": volume["name"]}
    assert example["envs"]["RUN"].startswith("/shared/")
    assert volume["config"] == {"access_mode": "ReadWriteMany"}
    names = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": rank}
    names |= {"SKYPILOT_NUM_NODES": str(example["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    (train, *rest) = calls(tmp_path, example["run"], **example["envs"], **names)
    options = parse(train[1:])
    assert (options["rank"], options["address"], options["nodes"]) == (int(rank), "10.0.0.7", 2)
    assert (options["gpus_per_node"], options["out"]) == (8, Path(example["envs"]["RUN"]))
    assert rest == [["llmtune", "run", example["envs"]["RUN"]]] * (rank == "0")


def test_dockerfile_copies_what_the_package_is_made_of() -> None:
    lines = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [name for name, _ in steps if name in ("FROM", "ARG", "CMD")] == ["FROM", "ARG", "CMD"]
    copied = [name.rstrip("/") for step, words in steps if step == "COPY" for name in words.split()[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]]
    assert {*needed, project["project"]["readme"], "pyproject.toml", "constraints.txt"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    runs = [words for step, words in steps if step == "RUN"]
    pattern = next(found[1] for words in runs if (found := re.search(r"grep '(\^torch==)' constraints.txt", words)))
    assert len(re.findall(pattern, (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1
    assert json.loads(steps[-1][1])[0] in project["project"]["scripts"]
    version = re.match(r"python:3\.(\d+)-slim$", steps[0][1])
    assert version
    assert int(version[1]) >= int(project["project"]["requires-python"].rpartition(".")[2])
