"""Checkpoints that are complete or absent: a folder that all processes fill, with a manifest written last."""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.errors import MachineError, TrainingError
from llmtune.files import fingerprint, read_json, write_folder, write_json
from llmtune.machine import processes
from llmtune.model.sharded import gather, shard_like
from llmtune.numbers import size as number_of_bytes
from llmtune.working import working

TENSORS = "trained.safetensors"
OBJECTIVE = "objective.json"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
Stamps = dict[str, tuple[int, int, int, int]]
"""What changes when a file does, by the names of a checkpoint's files."""
_VERIFIED: dict[Path, Stamps] = {}
"""The checkpoints that this process sealed or hashed: they are not read again until a file in them changes."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """How many optimizer steps came before a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def write_checkpoint(checkpoint: Path, first: bool, size: int = 0) -> Iterator[Path]:
    """A folder that every process fills; the `first` one then writes the manifest and gives the folder its name.

    `size` is how many bytes it takes, about; raises MachineError where the disk has less, and an error notes it.
    """
    if first:
        _remove_unfinished(checkpoint.parent)
    if lack := processes.broadcast(_lack_of_room(checkpoint.parent, size) if first else None):
        raise MachineError(lack)
    try:
        with _written(checkpoint, first) as partial:
            yield partial
    except Exception as error:
        if size:
            error.add_note(f"a checkpoint takes about {number_of_bytes(size)}")
        raise
    if first:
        _VERIFIED[checkpoint.absolute()] = _stamps(checkpoint)


def checkpoint_size(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint, about: the trained tensors in fp32, and the optimizer's states; whole, where sharded."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(4 * tensor.numel() for tensor in tensors) + sum(
        value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor)
    )


def _lack_of_room(folder: Path, size: int) -> str | None:
    """What a folder's disk lacks for `size` bytes, in words; None where there is room."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free >= size:
        return None
    need = f"a checkpoint takes about {number_of_bytes(size)}, and {number_of_bytes(free)} are free"
    return f"{folder}: {need}; free some, or lower train.keep"


@contextmanager
def _written(checkpoint: Path, first: bool) -> Iterator[Path]:
    with write_folder(checkpoint) if first else nullcontext(checkpoint) as partial:
        # The folder that is filled has a random name.
        yield Path(processes.broadcast(str(partial)))
        processes.wait()
        if first:
            write_json(partial / MANIFEST, _hashed(partial))
    processes.wait()


def _hashed(folder: Path) -> dict[str, Any]:
    """The fingerprints of all files in a folder, by name."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    # Hashing leaves the interpreter free: the tensors and the optimizer's states take the time of the larger one.
    with (
        working("sealing the checkpoint", sum(sizes.values()), "bytes", on_terminal=False) as step,
        ThreadPoolExecutor(4) as pool,
    ):
        manifest = {}
        for name, facts in zip(files, pool.map(fingerprint, files.values()), strict=True):
            manifest[name] = facts
            step(sizes[name])
    return manifest


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for partial in folder.glob(".step-*.partial-*"):
        shutil.rmtree(partial)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose every file is as its manifest says, on every machine, oldest first.

    Every process must ask; the first one on each machine hashes them, and no other one. One that this process sealed or
    hashed before is not read again, unless a file in it changed since.
    """
    mine = {checkpoint.name for checkpoint in _complete_here(folder)} if processes.is_first_here() else None
    answers = [names for names in processes.gather(mine) if names is not None]
    return [folder / name for name in sorted(set.intersection(*answers))]


def _complete_here(folder: Path) -> list[Path]:
    """The complete checkpoints as this process sees them, oldest first."""
    return [entry for entry in sorted(folder.glob("step-*")) if entry.name[5:].isdecimal() and _is_complete(entry)]


def _is_complete(checkpoint: Path) -> bool:
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    stamps = _stamps(checkpoint)
    if _VERIFIED.get(checkpoint.absolute()) == stamps:
        return True
    try:
        files: dict[str, Any] = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError):  # half written
        return False
    complete = all(
        (checkpoint / name).is_file() and fingerprint(checkpoint / name) == facts for name, facts in files.items()
    )
    if complete:
        _VERIFIED[checkpoint.absolute()] = stamps
    return complete


def _stamps(checkpoint: Path) -> Stamps:
    stats = {file.relative_to(checkpoint).as_posix(): file.stat() for file in checkpoint.rglob("*") if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats.items()}


def remove_old(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all complete checkpoints but the newest `keep`, and the one after step `best`."""
    for checkpoint in _complete_here(folder)[:-keep]:
        if checkpoint_step(checkpoint) != best:
            shutil.rmtree(checkpoint)


def save_state(folder: Path, tensors: dict[str, torch.Tensor], objective: dict[str, Any]) -> None:
    """Write the trained tensors and the objective's state into a checkpoint's folder."""
    save_file(tensors, folder / TENSORS)
    write_json(folder / OBJECTIVE, objective)


@torch.no_grad()
def load_state(checkpoint: Path, tensors: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Copy a checkpoint's tensors into those of the same names, and give the objective's state.

    Raises TrainingError where the names differ.
    """
    stored = load_file(checkpoint / TENSORS)  # mapped: each process reads its shards alone
    if set(stored) != set(tensors):
        raise TrainingError(f"{checkpoint}: its tensors are not those that this recipe trains; start a new run")
    with working("reading the trained weights", len(stored), "tensors", on_terminal=False) as step:
        for name, tensor in stored.items():
            tensors[name].copy_(shard_like(tensors[name], tensor))
            step()
    objective: dict[str, Any] = read_json(checkpoint / OBJECTIVE)
    return objective


def save_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, folder: Path, first: bool
) -> None:
    """Write the state of an optimizer of sharded parameters with whole tensors: the `first` process, though all ask."""
    stored = optimizer.state_dict()
    for place, state in stored["state"].items():
        stored["state"][place] = {key: _on_first(value, first) for key, value in state.items()}
    if first:
        torch.save(stored, folder / OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / SCHEDULER)


def _on_first(value: Any, first: bool) -> Any:
    """The full tensor of a state, in memory of the host, in the `first` process alone; what is no tensor as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    full = gather(value)
    return full.cpu() if first else None


def load_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, checkpoint: Path
) -> None:
    """Read what `save_sharded_optimizer` wrote into an optimizer of sharded parameters, and its scheduler."""
    # Mapped: the processes of a machine share the file's pages, and each copies its shards alone.
    stored = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, state in stored["state"].items():
        like = parameters[place]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # A copy: the file stays on disk for as long as a tensor is mapped from it.
                state[key] = shard_like(like, value) if value.shape == like.shape else value.clone()
    optimizer.load_state_dict(stored)
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))


def drop_states(optimizer: torch.optim.Optimizer, tensors: Iterable[nn.Parameter]) -> None:
    """Drop the optimizer's states of the tensors that are frozen now, which frees their memory."""
    for tensor in tensors:
        if not tensor.requires_grad:
            optimizer.state.pop(tensor, None)
