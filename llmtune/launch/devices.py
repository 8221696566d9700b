"""The devices of a run: the one that its launch section means, and what its processes see of this machine's GPUs."""

import contextlib
from typing import TYPE_CHECKING

from llmtune.errors import FieldError
from llmtune.launch.command import read_config
from llmtune.machine.device import run_device
from llmtune.recipe.sections import Launch

if TYPE_CHECKING:
    import torch


def launch_device(launch: Launch) -> "torch.device":
    """The device on which a run computes in this process: training, evaluation, merge and chat ask here."""
    return run_device(cpu=uses_cpu(launch))


def uses_cpu(launch: Launch) -> bool:
    """Whether a launch section keeps its run off GPUs; auto does not, nor does a config whose file is gone."""
    if launch.accelerate == "auto":
        return False
    with contextlib.suppress(FieldError):
        return bool(read_config(launch.accelerate).get("use_cpu"))
    return False
