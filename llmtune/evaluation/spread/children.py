"""Starts an evaluation in child processes through Accelerate, as a training starts."""

import contextlib
import shlex
import signal

from llmtune.errors import FieldError, LlmtuneError, MachineError, ProofError
from llmtune.evaluation.results import Evaluations
from llmtune.files import read_json
from llmtune.launch.command import choose_config, count_processes, read_config
from llmtune.launch.ending import Exit
from llmtune.launch.guard import Stopped
from llmtune.launch.process import run_module
from llmtune.machine.exits import STOPS, ending_signal, exit_words
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.sections import Launch
from llmtune.run import Run, kept_for_children

MODULE = "llmtune.evaluation.spread.process"


def wants_children(launch: Launch) -> bool:
    """Tell whether a launch section means several processes of this machine, and it has the GPUs for them."""
    gpus = count_gpus()
    with contextlib.suppress(FieldError):  # a training's config may be gone
        name = choose_config(launch, gpus)
        config, count = read_config(name), count_processes(launch, name, gpus)
        return count > 1 and int(config["num_machines"]) == 1 and (bool(config.get("use_cpu")) or count <= gpus)
    return False


def evaluate_in_children(run: Run) -> Evaluations:
    """Evaluate in as many processes as the launch section means; the caller holds the run's lock.

    Raises their error after their output has been printed.
    """
    print(f"starting to evaluate in several processes: {shlex.quote(str(run.path))}", flush=True)
    with kept_for_children(run):
        result = run_module(MODULE, run.recipe().launch, [str(run.path)])
        if result.code:
            raise _error(result)
    base, tuned, settings = (read_json(run.eval / f"{name}.json") for name in ("base", "tuned", "settings"))
    return {"base": base, "tuned": tuned, "settings": settings}


def _error(result: Exit) -> BaseException:
    """Make the error of an evaluation that ended early: its own line and code, or what a signal means."""
    number = ending_signal(result.code)
    if result.message:
        error = LlmtuneError(result.message)
        error.exit_code = result.code
        return error
    if number in STOPS:
        return Stopped(number)
    words = f"evaluation: a process {exit_words(result.code)}"
    return MachineError(f"{words}; set launch.processes: 1") if number == signal.SIGKILL else ProofError(words)
