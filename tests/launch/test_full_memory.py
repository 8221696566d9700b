"""A memory that is full in any part of a training ends it in one line: what was asked, what helps, what is safe."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.training.objective import SupervisedTrainer
from llmtune.training.process import main
from tests.support.training import prepare_run

ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.00 GiB of which 1.50 GiB is free."
)


@pytest.mark.parametrize(("part", "safe"), [("training_step", "training is safe up to step 2; "), ("evaluate", "")])
@pytest.mark.slow
def test_full_memory_in_a_step_or_a_validation_is_one_line_and_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str, safe: str
) -> None:
    lora = {"kind": "full", "adapter": {"kind": "lora", "rank": 4}}
    run = prepare_run(tmp_path, lora, count=20, train={"max_steps": 4, "batch_size": 2})
    whole, calls = getattr(SupervisedTrainer, part), list[None]()

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if part == "training_step" and len(calls) <= 2:
            return whole(*arguments, **named)
        raise torch.OutOfMemoryError(ERROR)

    monkeypatch.setattr(SupervisedTrainer, part, fail)
    assert main([str(run.path)]) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "out of memory on GPU 0: 2.1 GB was asked for, and 1.6 GB of 16.1 GB is free; lower it in a new run by " in line
    )
    assert "train.activation_checkpointing: on, train.micro_batch_size: 1, a lower data.max_length (now 1024), " in line
    assert line.endswith(f"; {safe}continue with: llmtune run {run.path}")
    assert "Traceback" not in line
