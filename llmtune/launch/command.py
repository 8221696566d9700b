"""Builds the command line and environment that train, from the recipe's launch section and this machine."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import FieldError, MachineError
from llmtune.files import shipped_folder
from llmtune.launch.surroundings import forget_launchers
from llmtune.memory import TUNABLES, UNCACHED
from llmtune.recipe.located_yaml import load_yaml
from llmtune.recipe.sections import Launch

TRAIN_MODULE = "llmtune.train"
LAUNCHER_MODULE = "llmtune.launch.accelerate_entry"
WORLD = "LLMTUNE_WORLD"  # the number of processes that the training must find
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # CUDA, ROCm, CUDA on Windows


def count_gpus(devices: Path = Path("/dev")) -> int:
    """Count the GPUs of this machine; torch is imported only where a GPU has a device file."""
    if not any(file for pattern in _GPU_FILES for file in devices.glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()


def choose_config(launch: Launch, gpus: int) -> str:
    """Return the name of the accelerate config: the recipe's, or for `auto` the one for that many GPUs."""
    if launch.accelerate != "auto":
        return launch.accelerate
    if gpus == 0:
        return "multi_cpu" if (launch.processes or 1) > 1 else "cpu"
    return "single_gpu" if gpus == 1 or launch.processes == 1 else "ddp"


def read_config(name: str) -> dict[str, Any]:
    """Read the values of a shipped accelerate config."""
    return dict(load_yaml(config_file(name)).value)


def config_file(name: str) -> Path:
    """Return the file of a shipped accelerate config."""
    return shipped_folder("accelerate_configs") / f"{name}.yaml"


def count_processes(launch: Launch, name: str, gpus: int) -> int:
    """Count the processes on all machines: the recipe's number, else one per GPU, or on CPUs the config's number.

    Raises FieldError where the recipe wants several processes of a config that runs one.
    """
    config = read_config(name)
    if config["distributed_type"] == "NO":
        if (launch.processes or 1) > 1:
            raise FieldError(
                "launch.processes", f"{name} runs one process, not {launch.processes}; try accelerate: multi_cpu or ddp"
            )
        return 1
    if launch.processes:
        return launch.processes
    return int(config["num_processes"]) if config.get("use_cpu") else max(1, gpus) * int(config["num_machines"])


def single_process_environment(config: dict[str, Any]) -> dict[str, str]:
    """Return the variables that `accelerate launch` would set for a single process; empty for several processes."""
    if config["distributed_type"] != "NO":
        return {}
    return {
        "ACCELERATE_USE_CPU": str(bool(config.get("use_cpu"))),
        "ACCELERATE_MIXED_PRECISION": str(config["mixed_precision"]),
    }


@dataclass(frozen=True)
class TrainingProcess:
    """How to start a training: its command line, its environment, and whether a launcher starts several processes."""

    arguments: list[str]
    environment: dict[str, str]
    launcher: bool


def training_process(launch: Launch, arguments: list[str], gpus: int, cores: int) -> TrainingProcess:
    """Build what starts a training on a machine with so many GPUs and CPU cores; raises as `training_command`."""
    name = choose_config(launch, gpus)
    single = single_process_environment(read_config(name))
    environment = training_environment(count_processes(launch, name, gpus), cores, gpus) | single
    return TrainingProcess(training_command(launch, arguments, gpus), environment, launcher=not single)


def training_command(launch: Launch, arguments: list[str], gpus: int) -> list[str]:
    """Build the command line that trains; raises MachineError where the machine has too few GPUs for it.

    A single process starts without accelerate's launcher, which would import torch only to start the same command.
    """
    name = choose_config(launch, gpus)
    count = count_processes(launch, name, gpus)
    config = read_config(name)
    needed = 0 if config.get("use_cpu") else -(-count // int(config["num_machines"]))
    if needed > gpus:
        hint = "auto, which uses the GPUs that there are" if gpus else "cpu or multi_cpu"
        raise MachineError(
            f"launch.accelerate: {name} needs {needed} GPU{'s' * (needed > 1)} and this machine has {gpus}; try {hint}"
        )
    if single_process_environment(config):
        return [sys.executable, "-m", TRAIN_MODULE, *arguments]
    launcher = [sys.executable, "-m", LAUNCHER_MODULE, "--config_file", str(config_file(name))]
    return [*launcher, "--num_processes", str(count), "-m", TRAIN_MODULE, *arguments]


def training_environment(count: int, cores: int, gpus: int = 0) -> dict[str, str]:
    """Return this environment with defaults for `count` processes: threads are shared out, no kernel is downloaded.

    What another launcher left in the environment is not passed on.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",
        "PYTHONSAFEPATH": "1",  # else `-m` imports a random.py of the working folder as the standard library's
    }
    if not gpus:
        defaults[TUNABLES] = UNCACHED
    users = dict(os.environ)
    forget_launchers(users)
    return {**defaults, **users, WORLD: str(count)}
