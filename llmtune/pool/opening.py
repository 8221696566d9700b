"""Opens the place that `--on` names, before anything runs there."""

from pathlib import Path

from llmtune.errors import RecipeError, nearest
from llmtune.pool.processes import Processes, gpu_slots
from llmtune.pool.task import Pool

PLACES = ("local", "gpus", "ray")


def open_pool(on: str, folder: Path) -> Pool:
    """The place where tasks of a folder run; raises RecipeError for an unknown one, MachineError for one not there."""
    if on == "local":
        return Processes(folder)
    if on == "gpus":
        return Processes(folder, gpu_slots())
    if on == "ray":
        from llmtune.pool.cluster import connect

        return connect(folder)
    raise RecipeError(f"--on {on[:100]}: is local, gpus or ray{nearest(on, list(PLACES))}")
