"""Several machines train one run, in a folder that all of them share."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmtune.cli import main
from llmtune.errors import LlmtuneError
from llmtune.launch.command import config_file
from llmtune.launch.surroundings import forget_launchers
from llmtune.run import Run
from llmtune.training import process
from llmtune.training.loop import train
from tests.support import ROOT, slurm, tiny
from tests.support.training import METHODS, prepare_run

METHOD = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.1}


@pytest.mark.slow
def test_a_slurm_job_trains_one_run_on_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs as SLURM would run it, but that both of its nodes are this machine, whose CPUs train."""
    monkeypatch.chdir(tmp_path)
    train_settings = {"epochs": 1, "batch_size": 4, "optimizer": "sgd"}
    alone = prepare_run(tmp_path, METHOD, name="alone", train=train_settings)
    train(alone)
    config = config_file("multi_cpu").read_text().replace("num_machines: 1", "num_machines: 2")
    (tmp_path / "two.yaml").write_text(config)
    sections = {"train": train_settings, "launch": {"accelerate": "two.yaml"}, "merge": {"enabled": False}}
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", tmp_path / "train.jsonl", METHOD, **sections)
    assert main(["launch", recipe.name, "--slurm", "--out", "shared"]) == 0
    programs = slurm.install(tmp_path / "bin", srun=slurm.SRUN, scontrol=slurm.SCONTROL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"}
    forget_launchers(environment)
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]"}
    job = subprocess.run(["bash", "job.sbatch"], env=environment, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count(" of 2 processes; they meet at 127.0.0.1:") == 2
    shared = Run(tmp_path / "shared")
    assert shared.done("train")
    assert (shared.path / "report.html").is_file()
    one, two = (load_file(next((run.path / "delta").glob("*.safetensors"))) for run in (alone, shared))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    states = {file.name for file in shared.path.glob("checkpoints/*/rng_state_*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_folder_that_another_machine_does_not_share_ends_training_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "join_processes", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(process, "_DELAY", 0.3)
    monkeypatch.setenv("GROUP_RANK", "1")
    line = "another machine does not; give a folder on a disk that all machines share, with --out"
    with pytest.raises(LlmtuneError, match=line) as caught:
        process._open_everywhere(Run(tmp_path / "run"))
    assert caught.value.exit_code == 3
    run = prepare_run(tmp_path, METHODS["full"])
    assert process._open_everywhere(run).path == run.path
