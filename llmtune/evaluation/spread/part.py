"""What one process of an evaluation does: all of it but for the questions of the others; the first one writes."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from llmtune.errors import LlmtuneError, ProofError
from llmtune.evaluation.step import evaluate_here
from llmtune.launch.faults import told_in_one_line
from llmtune.launch.process import report_failure
from llmtune.machine import processes
from llmtune.machine.device import run_device
from llmtune.run import open_run


def main(words: Sequence[str]) -> int:
    """Evaluate the run in the folder that the command line names, together with the other processes."""
    (folder,) = words
    try:
        with told_in_one_line(ProofError, Path(folder)), contextlib.ExitStack() as silenced:
            if not _join():
                sink = silenced.enter_context(open(os.devnull, "w"))
                silenced.enter_context(contextlib.redirect_stdout(sink))
            evaluate_here(open_run(Path(folder)))
            processes.wait()
    except LlmtuneError as error:
        return report_failure(error)
    return 0


def _join() -> bool:
    """Join the other processes, on this one's own device; tell whether this is the first."""
    device = run_device()
    PartialState(cpu=device.type == "cpu", timeout=processes.PATIENCE)
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # on the device that PartialState chose, where `run_device` looks
    processes.join()
    return processes.rank() == 0
