"""One machine's part of a training on several: the processes that it starts, and how they find the others."""

import contextlib
import socket
from dataclasses import dataclass

from llmtune.errors import FieldError, MachineError, RecipeError
from llmtune.launch.cluster.machines import Machines
from llmtune.launch.command import node_process
from llmtune.launch.ending import Exit, training_error
from llmtune.launch.engine import KEY
from llmtune.launch.process import execute
from llmtune.machine.cores import count_cores
from llmtune.machine.gpus import find_gpus
from llmtune.recipe.sections import Launch, Recipe
from llmtune.run import Run

PORT = 29500
"""The port of the first machine where the machines meet."""
PATIENCE = 900
"""Seconds that a machine waits for the others to start."""


@dataclass(frozen=True)
class Place:
    """Which of the machines this is, from 0, and the address and port at which the first one is reached."""

    rank: int
    address: str
    port: int = PORT


def check_place(machines: Machines, place: Place, launch: Launch) -> None:
    """Raise FieldError for a launch on one machine, and RecipeError for a rank or a port that cannot be."""
    if machines.count == 1:
        raise FieldError(KEY, f"{launch.accelerate} is for one machine: llmtune run RECIPE; several need multi_node")
    if not 0 <= place.rank < machines.count:
        raise RecipeError(f"--rank {place.rank}: the {machines.count} machines are 0 to {machines.count - 1}")
    if not 0 < place.port < 65536:
        raise RecipeError(f"--port {place.port}: a port is 1 to 65535; leave it out for {PORT}")


def train_node(recipe: Recipe, machines: Machines, place: Place, run: Run) -> None:
    """Train a recipe's file in this machine's processes; raises what ended them early.

    The first machine keeps other commands out of the run's folder.
    """
    words = [*recipe.overrides, f"launch.processes={machines.world}"]
    arguments = [str(recipe.file), *(f"--set={override}" for override in words), f"--out={run.path}"]
    with run.locked() if place.rank == 0 else contextlib.nullcontext():
        result = run_node(recipe.launch, machines, place, arguments)
    if result.code:
        raise training_error(result, run, recipe)


def run_node(launch: Launch, machines: Machines, place: Place, arguments: list[str]) -> Exit:
    """Run llmtune.train with these arguments in this machine's processes, and wait for their end.

    Raises MachineError where the machine has too few GPUs for them, or the first one's address or port is no good.
    """
    if place.rank == 0:
        _refuse_used_port(place.port)
    _refuse_unknown_host(place.address)
    share = (
        f"machine {place.rank} of {machines.count}, counted from 0: {machines.processes} of {machines.world} processes"
    )
    print(f"{share}; they meet at {place.address}:{place.port}, within {PATIENCE // 60} minutes", flush=True)
    options = ["--num_machines", str(machines.count), "--machine_rank", str(place.rank)]
    options += ["--main_process_ip", place.address, "--main_process_port", str(place.port)]
    options += ["--rdzv_backend", "static", "--rdzv_conf", f"timeout={PATIENCE}"]
    here, cores = machines.processes, count_cores()
    training = node_process(launch.accelerate, here, machines.world, find_gpus(), cores, options, arguments)
    return execute(training.arguments, training.environment, training.launcher)


def _refuse_used_port(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError as error:
            message = f"port {port} of this machine is in use; give another with --port, the same on every machine"
            raise MachineError(message) from error


def _refuse_unknown_host(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise MachineError(f"--address {address}: this machine knows no such host; give the first machine's") from error
