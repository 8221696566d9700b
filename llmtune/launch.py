"""Recipe and run -> the `accelerate launch` command line, and its execution as a child."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil  # type: ignore[import-untyped]

from llmtune.errors import Interrupted, MachineError
from llmtune.recipe import Recipe
from llmtune.run import Run
from llmtune.yamlfile import load_yaml

TRAIN_MODULE = "llmtune.train"
WORLD = "LLMTUNE_WORLD"  # how many processes the training is to find
EXIT_FILE = "LLMTUNE_EXIT_FILE"


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
    return dict(load_yaml(config_file(name)).value)


def config_file(name: str) -> Path:
    """The file of a shipped accelerate config."""
    return resource("accelerate_configs") / f"{name}.yaml"


def processes(recipe: Recipe, name: str, gpus: int) -> int:
    """Processes over all machines: the recipe's number, else one a GPU, or the config's on CPUs; raises RecipeError."""
    values = config(name)
    asked = recipe.launch.processes
    if values["distributed_type"] == "NO":
        if (asked or 1) > 1:
            raise recipe.error(
                "launch.processes", f"{name} runs one process, not {asked}; multi_cpu or ddp run several"
            )
        return 1
    each = int(values["num_processes"]) if values.get("use_cpu") else max(1, gpus) * int(values["num_machines"])
    return asked or each


def command(recipe: Recipe, run: Run, gpus: int) -> list[str]:
    """The command line that trains `run`; raises MachineError where the machine has too few GPUs for it."""
    name = choose(recipe, gpus)
    count = processes(recipe, name, gpus)
    values = config(name)
    needed = 0 if values.get("use_cpu") else -(-count // int(values["num_machines"]))
    if needed > gpus:
        instead = "auto takes what there is" if gpus else "cpu and multi_cpu need none"
        raise MachineError(f"launch.accelerate {name} needs {needed} GPUs and this machine has {gpus}; {instead}")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config_file(name))]
    return [*launcher, "--num_processes", str(count), "-m", TRAIN_MODULE, str(run.path)]


def environment(count: int, cores: int) -> dict[str, str]:
    """This environment for `count` processes; unless set, threads are shared out and no kernel is fetched."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",
        "PYTHONSAFEPATH": "1",  # -m would let a random.py in the working folder stand in for the standard library's
    }
    return {**defaults, **os.environ, WORLD: str(count)}


def execute(arguments: list[str], env: dict[str, str]) -> int:
    """Run a launcher to its end and give the training's exit code, 128 + signal where a stop signal ended it.

    The first two stop signals ask the training to stop, and its end is waited for; the third kills it.
    """
    children: list[subprocess.Popen[bytes]] = []
    stops: list[int] = []

    def stop(number: int) -> None:
        stops.append(number)
        for child in children:
            _pass_on(child.pid, signal.SIGINT if len(stops) < 3 else signal.SIGKILL)

    with tempfile.TemporaryDirectory() as folder, _handling(stop):
        left = Path(folder) / "code"
        # A group of its own: Ctrl-C in a terminal would end accelerate at once, with the training still saving.
        child = subprocess.Popen(
            arguments, env={**env, EXIT_FILE: str(left)}, stdin=subprocess.DEVNULL, process_group=0
        )
        children.append(child)
        if stops:
            child.kill()
        code = child.wait()
        if left.is_file():
            code = int(left.read_text())
    if stops and code:
        return 128 + stops[0]
    return code if code >= 0 else 128 - code


def leave(code: int) -> NoReturn:
    """End a training process with a code that survives its launcher, which turns every failure into 1."""
    told = os.environ.get(EXIT_FILE)
    if told and code:
        # "x": the first rank that fails is the cause of the others.
        with contextlib.suppress(FileExistsError), open(told, "x") as file:
            file.write(str(code))
    # When a rank fails, torchrun kills the others, and after Ctrl-C one of them may still be writing the checkpoint.
    sys.exit(0 if told and code == Interrupted.exit_code else code)


@contextlib.contextmanager
def _handling(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` for stop signals, except for a SIGHUP that nohup has switched off."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    numbers = (signal.SIGINT, signal.SIGTERM, *hung_up)
    before = {number: signal.signal(number, lambda caught, _frame: stop(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(launcher: int, number: int) -> None:
    """Signal the training processes, which are the launcher's children; where it has none yet, end the launcher."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        training = process.children()
        for child in training:
            child.send_signal(number)
        if not training:
            process.kill()
