"""Recipe and run -> the `accelerate launch` command line, and its execution as a child."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmtune.errors import MachineError
from llmtune.recipe import Recipe
from llmtune.run import Run
from llmtune.yamlfile import load_yaml

TRAIN_MODULE = "llmtune.train"


def resource(name: str) -> Path:
    """A folder that ships with llmtune, in an installed wheel or in a checkout."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / name


def choose(recipe: Recipe, gpus: int) -> str:
    """The accelerate config's name: the recipe's, or what suits a machine with that many GPUs."""
    if recipe.launch.accelerate != "auto":
        return recipe.launch.accelerate
    if gpus == 0:
        return "multi_cpu" if (recipe.launch.processes or 1) > 1 else "cpu"
    return "single_gpu" if gpus == 1 or recipe.launch.processes == 1 else "ddp"


def config(name: str) -> dict[str, Any]:
    """The values of a shipped accelerate config."""
    return dict(load_yaml(resource("accelerate_configs") / f"{name}.yaml").value)


def processes(recipe: Recipe, name: str, gpus: int) -> int:
    """How many processes a launch of this recipe asks for; all GPUs where neither recipe nor config says."""
    return recipe.launch.processes or int(config(name).get("num_processes") or max(1, gpus))


def command(recipe: Recipe, run: Run, gpus: int) -> list[str]:
    """The command line that trains `run`."""
    name = choose(recipe, gpus)
    file = resource("accelerate_configs") / f"{name}.yaml"
    count = str(processes(recipe, name, gpus))
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--num_processes",
        count,
    ]
    return [*launcher, "-m", TRAIN_MODULE, str(run.path)]


def environment(count: int, cores: int) -> dict[str, str]:
    """The child's environment: this one, the threads shared out between processes unless the user chose, no kernel download."""
    threads = str(max(1, cores // count))
    defaults = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**defaults, **os.environ}


def execute(arguments: list[str], env: dict[str, str]) -> int:
    """Run the child to its end and give its exit code; Ctrl-C reaches it too, and it is waited for."""
    try:
        child = subprocess.Popen(arguments, env=env)
    except OSError as error:
        raise MachineError(f"cannot start {arguments[0]}: {error.strerror}") from error
    while True:
        try:
            code = child.wait()
            return 130 if code in (-signal.SIGINT, 130) else code
        except KeyboardInterrupt:
            continue
