"""Builds the command line and environment that train, from the recipe's launch section and this machine."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import FieldError, MachineError, nearest
from llmtune.files import shipped_folder
from llmtune.launch.engine import KEY, check_kind
from llmtune.launch.surroundings import forget_launchers
from llmtune.machine.gpus import VISIBLE, Gpus, first_gpu
from llmtune.machine.memory import TUNABLES, UNCACHED
from llmtune.recipe.located_yaml import load_yaml
from llmtune.recipe.paths import exists
from llmtune.recipe.sections import Launch
from llmtune.recipe.shorthand import is_config_file

TRAIN_MODULE = "llmtune.train"
LAUNCHER_MODULE = "llmtune.launch.accelerate_entry"
WORLD = "LLMTUNE_WORLD"  # the number of processes that the training must find
CORES = "LLMTUNE_CORES"  # the CPU cores of a process that shares the machine with others, and of what it starts
_NEEDED = {"distributed_type": str, "mixed_precision": str, "num_machines": int, "num_processes": int}
"""What is read of every accelerate config, and its types."""
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Settings of torch's allocator on GPUs: the name, and older ones."""


def choose_config(launch: Launch, gpus: int) -> str:
    """Return the name or path of the accelerate config: the recipe's, or for `auto` the one for that many GPUs."""
    if launch.accelerate != "auto":
        return launch.accelerate
    if gpus == 0:
        return "multi_cpu" if (launch.processes or 1) > 1 else "cpu"
    return "single_gpu" if gpus == 1 or launch.processes == 1 else "ddp"


def read_config(name: str) -> dict[str, Any]:
    """Read the values of an accelerate config; raises FieldError for a file that lacks some, or is DeepSpeed's."""
    file = config_file(name)
    if not (exists(str(file)) and file.is_file()):
        raise FieldError(KEY, f"no such file: {str(file)[:200]}{_nearest_file(file)}")
    values = dict(load_yaml(file).value)
    missing = [key for key, kind in _NEEDED.items() if not isinstance(values.get(key), kind)]
    if missing:
        kind = "a whole number" if _NEEDED[missing[0]] is int else "text"
        message = f"{file} needs {missing[0]}, {kind}; `accelerate config --config_file {file}` writes a complete one"
        raise FieldError(KEY, message)
    check_kind(values["distributed_type"], name)
    return values


def config_file(name: str) -> Path:
    """Return the file of an accelerate config: a shipped one by name, or the user's own by path."""
    return Path(name).absolute() if is_config_file(name) else shipped_folder("accelerate_configs") / f"{name}.yaml"


def _nearest_file(file: Path) -> str:
    beside = [other.name for other in file.parent.glob("*.y*ml")] if exists(str(file.parent)) else []
    return nearest(file.name, beside, 0.75)


def count_processes(launch: Launch, name: str, gpus: int) -> int:
    """Count the processes on all machines: the recipe's number, else one per GPU, on CPUs the config's number.

    A config of the user's own always means the number that it holds.

    Raises FieldError where the recipe wants several processes of a config that runs one.
    """
    config = read_config(name)
    if config["distributed_type"] == "NO":
        if (launch.processes or 1) > 1:
            raise FieldError(
                "launch.processes", f"{name} runs one process, not {launch.processes}; try accelerate: multi_cpu or ddp"
            )
        return 1
    if launch.processes or is_config_file(name):
        return launch.processes or int(config["num_processes"])
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


def training_process(
    launch: Launch, arguments: list[str], gpus: Gpus, cores: int, module: str = TRAIN_MODULE
) -> TrainingProcess:
    """Build what starts a training, or another `module` as one, on a machine with these GPUs and CPU cores.

    Raises MachineError where the machine has too few GPUs for it, FieldError for a config of several machines.
    """
    name = choose_config(launch, gpus.count)
    config, count = read_config(name), count_processes(launch, name, gpus.count)
    _check_machine(name, config, count, gpus)
    single = single_process_environment(config)
    environment = training_environment(count, cores, 0 if config.get("use_cpu") else gpus.count) | single
    environment |= gpu_environment(config, count, environment)
    # A single process starts without the launcher, which would import torch only to start the same command.
    alone = [sys.executable, "-m", module, *arguments]
    command = alone if single else _launcher_command(name, count, [], module, arguments)
    return TrainingProcess(command, environment, launcher=not single)


def _check_machine(name: str, config: Mapping[str, Any], count: int, gpus: Gpus) -> None:
    """Raise MachineError or FieldError for a config under which this machine cannot start so many processes."""
    _refuse_several_machines(config, name)
    if not config.get("use_cpu"):
        _refuse_too_few(name, count, gpus)
    if config["distributed_type"] == "FSDP" and count == 1:
        message = f"{KEY}: {name} shards over several GPUs and would find one; try single_gpu, or auto"
        raise MachineError(message)


def node_process(
    name: str, here: int, world: int, gpus: Gpus, cores: int, options: list[str], arguments: list[str]
) -> TrainingProcess:
    """Build what starts the `here` of all processes that run on this machine; `options` are accelerate's.

    Raises MachineError where the machine has too few GPUs for them.
    """
    config = read_config(name)
    on_cpu = bool(config.get("use_cpu"))
    if not on_cpu:
        _refuse_too_few(name, here, gpus)
    environment = training_environment(here, cores, 0 if on_cpu else gpus.count) | {WORLD: str(world)}
    environment |= gpu_environment(config, here, environment)
    return TrainingProcess(_launcher_command(name, world, options, TRAIN_MODULE, arguments), environment, launcher=True)


def _launcher_command(name: str, world: int, options: list[str], module: str, arguments: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", LAUNCHER_MODULE, "--config_file", str(config_file(name))]
    return [*launcher, "--num_processes", str(world), *options, "-m", module, *arguments]


def _refuse_several_machines(config: Mapping[str, Any], name: str) -> None:
    machines = int(config["num_machines"])
    if machines > 1:
        how = "llmtune launch RECIPE --rank RANK --address FIRST --out RUN"
        where = f"with its rank, 0 to {machines - 1}, the first one's address, and RUN on a disk that all share"
        slurm = "llmtune launch RECIPE --slurm writes a job that does"
        message = f"{name} is for {machines} machines, and this command starts one; on each, run {how} ({where})"
        raise FieldError(KEY, f"{message}; {slurm}")


def _refuse_too_few(name: str, needed: int, gpus: Gpus) -> None:
    if needed <= gpus.count:
        return
    needs = f"{KEY}: {name} needs {needed} GPU{'s' * (needed > 1)} and"
    if gpus.fault:
        raise MachineError(f"{needs} torch can use {gpus.count}: {gpus.fault}")
    hint = "auto, which uses the GPUs that there are" if gpus.count else "cpu or multi_cpu"
    raise MachineError(f"{needs} this machine has {gpus.count}; try {hint}")


def gpu_environment(config: Mapping[str, Any], count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a training's processes see of the GPUs: none on CPUs, one where a process is alone.

    On GPUs, torch's allocator grows its pieces, since every batch has its own length; a user's own setting stands.
    """
    if config.get("use_cpu"):
        return {VISIBLE: ""}
    own = any(name in environment for name in _ALLOCATORS)
    settings = {} if own else {_ALLOCATORS[0]: "expandable_segments:True"}
    if count == 1:
        named = str(config.get("gpu_ids") or "all")
        settings[VISIBLE] = first_gpu(environment.get(VISIBLE) if named == "all" else named)
    return settings


def training_environment(count: int, cores: int, gpus: int = 0) -> dict[str, str]:
    """Return this environment with defaults for `count` processes: threads are shared out, no kernel is downloaded.

    What another launcher left in the environment is not passed on.
    """
    users = dict(os.environ)
    if CORES in users:
        cores = int(users[CORES])
        users.pop("OMP_NUM_THREADS", None)  # set beside it, for one process
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",
        "PYTHONSAFEPATH": "1",  # else `-m` imports a random.py of the working folder as the standard library's
    }
    if not gpus:
        defaults[TUNABLES] = UNCACHED
    forget_launchers(users)
    return {**defaults, **users, WORLD: str(count)}


def child_environment(cores: int, own: dict[str, str], gpus: bool) -> dict[str, str]:
    """Return this environment for one process of llmtune on so many CPU cores, with settings of its own."""
    threads = os.environ.get("OMP_NUM_THREADS")
    environment = training_environment(1, cores, int(gpus)) | own
    return environment if threads and CORES not in os.environ else environment | {CORES: str(cores)}
