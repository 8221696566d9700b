"""How a training that ended early is told: its own message, or what a signal means, what is safe, and how to go on."""

import contextlib
import json
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import Interrupted, LlmtuneError, MachineError, TrainingError
from llmtune.files import are_fingerprints
from llmtune.machine.exits import STOPS, ending_signal, exit_words
from llmtune.machine.gpus import count_gpus
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

_WHO = "the training process"


@dataclass(frozen=True)
class Exit:
    """How a training ended: its exit code, 128 + the number of a signal that ended it, and its error message."""

    code: int
    message: str = ""


def training_error(result: Exit, run: Run, recipe: Recipe | None = None) -> LlmtuneError:
    """Make the error of a training that ended early: its own message and code, or a line that says how to continue.

    `recipe` serves to name the settings that lower memory.
    """
    number, resume = ending_signal(result.code), resume_words(run)
    if result.message:
        error = LlmtuneError(result.message)
        error.exit_code = result.code
    elif number in STOPS:
        error = Interrupted(f"stopped; {resume}")
        error.exit_code = result.code
    elif number == signal.SIGKILL:
        advice = f"; {less_memory(recipe)}" if recipe else ""
        error = MachineError(f"{_WHO} {exit_words(result.code)}{advice}; {resume}")
    else:
        error = TrainingError(f"{_WHO} {exit_words(result.code)}; {resume}")
    return error


def resume_words(run: Run) -> str:
    """What of a run's training is safe, and the command that continues it."""
    if not run.recipe_file.is_file():
        return "nothing was trained yet"
    manifests = filter(_is_whole, run.checkpoints.glob("step-*/manifest.json"))
    names = [file.parent.name.removeprefix("step-") for file in manifests]
    saved = [int(name) for name in names if name.isdecimal()]
    safe = f"training is safe up to step {max(saved)}; " if saved else ""
    return f"{safe}continue with: llmtune run {shlex.quote(str(run.path))}"


def _is_whole(manifest: Path) -> bool:
    """Whether the files of a checkpoint are there in their sizes; to hash them would take too long here."""
    with contextlib.suppress(OSError, ValueError):
        files = json.loads(manifest.read_text(encoding="utf-8"))
        return are_fingerprints(files) and all(
            (manifest.parent / name).stat().st_size == one["bytes"] for name, one in files.items()
        )
    return False


def less_memory(recipe: Recipe) -> str:
    """The settings that lower the memory of a recipe's training, those that cost least first, in words."""
    train, model, adapter = recipe.train, recipe.model, recipe.method.adapter
    may_be_4bit = model.quantize != "4bit" and not adapter.trains_base and adapter.unquantizable is None
    tokens = train.micro_batch_tokens
    options = {
        "train.activation_checkpointing: on": train.activation_checkpointing is not True,
        f"a lower train.micro_batch_tokens (now {tokens})": tokens is not None,
        "train.micro_batch_size: 1": train.micro_batch_size != 1 and train.batch_size > 1 and tokens is None,
        f"a lower data.max_length (now {recipe.data.max_length})": True,
        "model.precision: bf16": model.precision == "fp32",
        "model.quantize: 4bit": may_be_4bit,
        "train.optimizer: adamw_8bit": train.optimizer == "adamw",
        "an adapter such as lora": adapter.trains_base,
        "launch.accelerate: fsdp2": count_gpus() > 1 and recipe.launch.accelerate != "fsdp2",
    }
    return f"lower it in a new run by {', '.join(words for words, helps in options.items() if helps)}"
