"""How many machines a training takes, and how many processes and GPUs each of them has."""

from dataclasses import dataclass

from llmtune.errors import FieldError, RecipeError
from llmtune.launch.command import read_config
from llmtune.launch.engine import KEY
from llmtune.recipe.sections import Launch


@dataclass(frozen=True)
class Machines:
    """The machines of a training: their number, and the processes and GPUs of each."""

    count: int
    processes: int
    gpus: int

    @property
    def world(self) -> int:
        """The number of processes on all machines."""
        return self.count * self.processes


def read_machines(launch: Launch, nodes: int | None = None, gpus_per_node: int | None = None) -> Machines:
    """The machines that a launch section means; `nodes` and `gpus_per_node` count more than the section.

    Raises FieldError where its config is for another kind of launch, and RecipeError for GPUs of a launch on CPUs.
    """
    if launch.accelerate == "auto":
        _refuse_other_kind("auto", 1, nodes)
        processes = gpus_per_node or launch.processes or 1
        return Machines(1, processes, processes if gpus_per_node is None else gpus_per_node)
    config = read_config(launch.accelerate)
    count = nodes or int(config["num_machines"])
    _refuse_other_kind(launch.accelerate, int(config["num_machines"]), nodes)
    on_cpu = bool(config.get("use_cpu"))
    if on_cpu and gpus_per_node:
        raise RecipeError(f"--gpus-per-node {gpus_per_node}: {KEY} {launch.accelerate} is for CPUs; leave it out")
    if gpus_per_node:
        processes = gpus_per_node
    elif launch.processes:
        processes = _share("launch.processes", launch.processes, count)
    else:
        processes = _share(KEY, int(config["num_processes"]), int(config["num_machines"]))
    return Machines(count, processes, 0 if on_cpu else processes)


def _refuse_other_kind(name: str, count: int, nodes: int | None) -> None:
    if nodes is None or (nodes > 1) == (count > 1):
        return
    if nodes > 1:
        instead = f"try multi_node, or a file of your own with num_machines: {nodes}"
        raise FieldError(KEY, f"{name} is for one machine, not for --nodes {nodes}; {instead}")
    raise FieldError(KEY, f"{name} is for {count} machines, not for --nodes 1; try ddp or auto")


def _share(key: str, processes: int, machines: int) -> int:
    """The processes of each machine; raises FieldError where they cannot be shared out evenly."""
    if processes % machines:
        nearest = max(1, round(processes / machines)) * machines
        raise FieldError(key, f"{processes} processes are not divisible by {machines} machines; try {nearest}")
    return processes // machines
