"""Opens the place that `--on` names, before anything runs there."""

from pathlib import Path

from llmtune.errors import check_word
from llmtune.pool.processes import Processes, gpu_slots
from llmtune.pool.task import Pool

PLACES = ("local", "gpus", "ray")


def check_place(on: str) -> None:
    """Raise RecipeError for a word that is no place where tasks run."""
    check_word("--on", on, PLACES)


def open_pool(on: str, folder: Path) -> Pool:
    """The place where tasks of a folder run; raises RecipeError for an unknown one, MachineError for one not there."""
    check_place(on)
    if on == "local":
        return Processes(folder)
    if on == "gpus":
        return Processes(folder, gpu_slots())
    from llmtune.pool.cluster import connect

    return connect(folder)
