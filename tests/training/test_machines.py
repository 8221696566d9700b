"""Several machines train one run, by hand, in a folder that all of them share."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmtune.errors import LlmtuneError
from llmtune.launch.surroundings import forget_launchers
from llmtune.run import Run
from llmtune.training import process
from llmtune.training.loop import train
from tests.support import ROOT, tiny
from tests.support.training import METHODS, prepare_run

METHOD = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.1}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.slow
def test_two_machines_by_hand_train_one_run_in_a_shared_folder(tmp_path: Path) -> None:
    """As `accelerate launch --num_machines 2` starts them; the only process of each machine is its first."""
    train_settings = {"epochs": 1, "batch_size": 4, "optimizer": "sgd"}
    alone = prepare_run(tmp_path, METHOD, name="alone", train=train_settings)
    train(alone)
    sections = {"train": train_settings, "launch": {"accelerate": "multi_node", "processes": 2}}
    recipe = tiny.write_recipe(tmp_path / "two.yaml", tmp_path / "base", tmp_path / "train.jsonl", METHOD, **sections)
    shared = tmp_path / "shared"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    forget_launchers(environment)
    machines = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        variables = {**environment, **place, "RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": "0"}
        command = [sys.executable, "-m", "llmtune.train", str(recipe), "--out", str(shared)]
        machines.append(
            subprocess.Popen(command, cwd=tmp_path / rank, env=variables, stderr=subprocess.PIPE, text=True)
        )
    errors = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert Run(shared).done("train")
    weights = [next((folder / "delta").glob("*.safetensors")) for folder in (alone.path, shared)]
    one, two = map(load_file, weights)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert {file.name for file in shared.glob("checkpoints/*/rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


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
