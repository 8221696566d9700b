"""Recipe and run -> the `accelerate launch` command line, and its execution as a child."""

import os
import sys
from pathlib import Path
from typing import Any

from llmtune.errors import FieldError, MachineError
from llmtune.files import shipped_folder
from llmtune.memory import TUNABLES, UNCACHED
from llmtune.recipe.located_yaml import load_yaml
from llmtune.recipe.sections import Recipe

TRAIN_MODULE = "llmtune.train"
LAUNCHER_MODULE = "llmtune.launch.accelerate_entry"
WORLD = "LLMTUNE_WORLD"  # how many processes the training is to find
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # of CUDA, of ROCm, of CUDA under Windows


def count_gpus() -> int:
    """How many GPUs this machine has; torch is asked, and imported, only where there is a device file of one."""
    if not any(file for pattern in _GPU_FILES for file in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()


def choose_config(recipe: Recipe, gpus: int) -> str:
    """The accelerate config's name: the recipe's, or what suits a machine with that many GPUs."""
    if recipe.launch.accelerate != "auto":
        return recipe.launch.accelerate
    if gpus == 0:
        return "multi_cpu" if (recipe.launch.processes or 1) > 1 else "cpu"
    return "single_gpu" if gpus == 1 or recipe.launch.processes == 1 else "ddp"


def read_config(name: str) -> dict[str, Any]:
    """The values of a shipped accelerate config."""
    return dict(load_yaml(config_file(name)).value)


def config_file(name: str) -> Path:
    """The file of a shipped accelerate config."""
    return shipped_folder("accelerate_configs") / f"{name}.yaml"


def count_processes(recipe: Recipe, name: str, gpus: int) -> int:
    """Processes over all machines: the recipe's number, else one a GPU, or the config's on CPUs; raises RecipeError."""
    values = read_config(name)
    asked = recipe.launch.processes
    if values["distributed_type"] == "NO":
        if (asked or 1) > 1:
            raise FieldError("launch.processes", f"{name} runs one process, not {asked}; multi_cpu or ddp run several")
        return 1
    each = int(values["num_processes"]) if values.get("use_cpu") else max(1, gpus) * int(values["num_machines"])
    return asked or each


def _alone(values: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch` would tell a process that is alone; empty where there are several."""
    if values["distributed_type"] != "NO":
        return {}
    return {
        "ACCELERATE_USE_CPU": str(bool(values.get("use_cpu"))),
        "ACCELERATE_MIXED_PRECISION": str(values["mixed_precision"]),
    }


def training_command(recipe: Recipe, arguments: list[str], gpus: int) -> list[str]:
    """The command line that trains; raises MachineError where the machine has too few GPUs for it.

    One process is started as it is: accelerate's launcher would import torch first, only to do the same.
    """
    name = choose_config(recipe, gpus)
    count = count_processes(recipe, name, gpus)
    values = read_config(name)
    needed = 0 if values.get("use_cpu") else -(-count // int(values["num_machines"]))
    if needed > gpus:
        instead = "auto takes what there is" if gpus else "cpu and multi_cpu need none"
        raise MachineError(f"launch.accelerate {name} needs {needed} GPUs and this machine has {gpus}; {instead}")
    if _alone(values):
        return [sys.executable, "-m", TRAIN_MODULE, *arguments]
    launcher = [sys.executable, "-m", LAUNCHER_MODULE, "--config_file", str(config_file(name))]
    return [*launcher, "--num_processes", str(count), "-m", TRAIN_MODULE, *arguments]


def training_environment(count: int, cores: int, gpus: int = 0) -> dict[str, str]:
    """This environment for `count` processes; unless set, threads are shared out and no kernel is fetched."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",
        "PYTHONSAFEPATH": "1",  # -m would let a random.py in the working folder stand in for the standard library's
    }
    if not gpus:
        defaults[TUNABLES] = UNCACHED
    return {**defaults, **os.environ, WORLD: str(count)}
