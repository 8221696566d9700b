"""Two processes: sharded runs equal the single process, and weights that drift apart end the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes

ROOT = Path(__file__).parents[1]


def two(task: str, out: Path, **environment: str) -> None:
    """Run a task of tests/processes.py in two processes."""

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, "-m", "tests.processes", task, str(out)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_staged_and_lora_runs_under_fsdp2_equal_the_single_process(tmp_path: Path) -> None:
    two("shard", tmp_path)
    for name, method in processes.METHODS.items():
        alone, sharded = processes.steps(method, 0, 1), load_file(tmp_path / f"{name}.safetensors")
        assert set(alone) == set(sharded)
        for key, tensor in alone.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=0, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.slow
def test_processes_whose_weights_drift_apart_end_the_run_at_the_stages_end(tmp_path: Path) -> None:
    two("train", tmp_path, MEDDLE="1")
    for rank in (0, 1):
        said = (tmp_path / f"error-{rank}").read_text()
        assert said.startswith("the processes' weights differ at step 2")
        assert (tmp_path / f"reached-{rank}").read_text() == "2"


@pytest.mark.slow
def test_processes_whose_weights_agree_go_on_to_the_end(tmp_path: Path) -> None:
    two("train", tmp_path)
    assert [(tmp_path / f"reached-{rank}").read_text() for rank in (0, 1)] == ["6", "6"]
    assert not list(tmp_path.glob("error-*"))
