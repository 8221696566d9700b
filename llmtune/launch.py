"""Recipe and run -> the `accelerate launch` command line, and its execution as a child."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil  # type: ignore[import-untyped]

from llmtune.errors import Interrupted, LlmtuneError, MachineError, TrainingError
from llmtune.files import shipped_folder
from llmtune.memory import TUNABLES, UNCACHED
from llmtune.recipe.located_yaml import load_yaml
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

TRAIN_MODULE = "llmtune.train"
LAUNCHER_MODULE = "llmtune.launcher"
WORLD = "LLMTUNE_WORLD"  # how many processes the training is to find
EXIT_FILE = "LLMTUNE_EXIT_FILE"
_GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")  # of CUDA, of ROCm, of CUDA under Windows


@dataclass(frozen=True)
class Ended:
    """How a training ended: its exit code, 128 + signal where one ended it, and what it said of it, if anything."""

    code: int
    said: str = ""


def gpus() -> int:
    """How many GPUs this machine has; torch is asked, and imported, only where there is a device file of one."""
    if not any(file for pattern in _GPU_FILES for file in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()


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
    return shipped_folder("accelerate_configs") / f"{name}.yaml"


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


def train(recipe: Recipe, run: Run, arguments: list[str]) -> None:
    """Train in processes of their own; what ends them early is raised, to be told after everything that they wrote."""
    ended = start(recipe, arguments)
    if not ended.code:
        return
    again = f"go on with: llmtune run {run.path}" if run.recipe_file.is_file() else "nothing was trained yet"
    if ended.code > 128:
        failed: LlmtuneError = Interrupted(ended.said or f"stopped; {again}")
    else:
        failed = TrainingError(ended.said or f"training ended with code {ended.code}; {again}")
    told = bool(ended.said) or ended.code > 128
    failed.exit_code = ended.code if told else TrainingError.exit_code
    raise failed


def start(recipe: Recipe, arguments: list[str]) -> Ended:
    """Train what `arguments` tell llmtune.train, in as many processes as recipe and machine say, and wait for it."""
    here = gpus()
    name = choose(recipe, here)
    env = environment(processes(recipe, name, here), len(os.sched_getaffinity(0)), here)
    alone = _alone(config(name))
    return execute(command(recipe, arguments, here), {**env, **alone}, launcher=not alone)


def runs_one(recipe: Recipe) -> bool:
    """Whether one process trains, so that it may prepare the run too."""
    return bool(_alone(config(choose(recipe, gpus()))))


def _alone(values: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch` would tell a process that is alone; empty where there are several."""
    if values["distributed_type"] != "NO":
        return {}
    return {
        "ACCELERATE_USE_CPU": str(bool(values.get("use_cpu"))),
        "ACCELERATE_MIXED_PRECISION": str(values["mixed_precision"]),
    }


def command(recipe: Recipe, arguments: list[str], gpus: int) -> list[str]:
    """The command line that trains; raises MachineError where the machine has too few GPUs for it.

    One process is started as it is: accelerate's launcher would import torch first, only to do the same.
    """
    name = choose(recipe, gpus)
    count = processes(recipe, name, gpus)
    values = config(name)
    needed = 0 if values.get("use_cpu") else -(-count // int(values["num_machines"]))
    if needed > gpus:
        instead = "auto takes what there is" if gpus else "cpu and multi_cpu need none"
        raise MachineError(f"launch.accelerate {name} needs {needed} GPUs and this machine has {gpus}; {instead}")
    if _alone(values):
        return [sys.executable, "-m", TRAIN_MODULE, *arguments]
    launcher = [sys.executable, "-m", LAUNCHER_MODULE, "--config_file", str(config_file(name))]
    return [*launcher, "--num_processes", str(count), "-m", TRAIN_MODULE, *arguments]


def environment(count: int, cores: int, gpus: int = 0) -> dict[str, str]:
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


def execute(arguments: list[str], env: dict[str, str], launcher: bool) -> Ended:
    """Run a training, or its launcher, to its end.

    The first two stop signals ask the training to stop, and its end is waited for; the third kills it.
    """
    children: list[subprocess.Popen[bytes]] = []
    stops: list[int] = []

    def stop(number: int) -> None:
        stops.append(number)
        for child in children:
            # Python ends at once and in silence on SIGTERM, while Ctrl-C in the middle of an import is a traceback.
            _pass_on(child.pid, signal.SIGTERM if len(stops) < 3 else signal.SIGKILL, launcher)

    with tempfile.TemporaryDirectory() as folder, _handling(stop):
        left = Path(folder) / "code"
        # A group of its own: Ctrl-C in a terminal would end accelerate at once, with the training still saving.
        child = subprocess.Popen(
            arguments, env={**env, EXIT_FILE: str(left)}, stdin=subprocess.DEVNULL, process_group=0
        )
        children.append(child)
        if stops:
            child.kill()
        code, said = child.wait(), ""
        if left.is_file():
            told, _, said = left.read_text().partition("\n")
            code = int(told)
    if stops and code:
        return Ended(128 + stops[0], said)
    return Ended(code if code >= 0 else 128 - code, said)


def tell(error: LlmtuneError) -> int:
    """Say why a training ends, to the command that started it or, without one, on stderr; gives the exit code."""
    if EXIT_FILE in os.environ:
        _write_once(f"{error.exit_code}\n{error}")
    else:
        print(f"llmtune: {error}", file=sys.stderr)
    return error.exit_code


def _write_once(text: str) -> None:
    # "x": the first rank that fails is the cause of the others.
    with contextlib.suppress(FileExistsError), open(os.environ[EXIT_FILE], "x") as file:
        file.write(text)


def leave(code: int) -> NoReturn:
    """End a training process with a code that survives its launcher, which turns every failure into 1."""
    told = EXIT_FILE in os.environ
    if told and code:
        _write_once(f"{code}\n")
    # When a rank fails, torchrun kills the others, and after Ctrl-C one of them may still be writing the checkpoint.
    shown = 0 if told and code == Interrupted.exit_code else code
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # A process group that a failure leaves open may abort the interpreter's own end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(shown)
    sys.exit(shown)


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


def _pass_on(child: int, number: int, launcher: bool) -> None:
    """Signal the training: the child itself, or the children of a launcher, which is ended where it has none yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child)
        training = process.children() if launcher else [process]
        for one in training:
            one.send_signal(number)
        if not training:
            process.kill()
