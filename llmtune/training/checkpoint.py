"""Checkpoints that are complete or absent: a folder that all processes fill, with a manifest written last."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.errors import TrainingError
from llmtune.files import fingerprint, read_json, write_folder, write_json
from llmtune.model.sharded import gather, shard_like
from llmtune.numbers import size as number_of_bytes

TENSORS = "trained.safetensors"
OBJECTIVE = "objective.json"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """How many optimizer steps came before a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def write_checkpoint(checkpoint: Path, first: bool, size: int = 0) -> Iterator[Path]:
    """A folder that every process fills; the `first` one then writes the manifest and gives the folder its name.

    `size` is how many bytes it takes, about, which an error notes.
    """
    try:
        with _written(checkpoint, first) as partial:
            yield partial
    except Exception as error:
        if size:
            error.add_note(f"a checkpoint takes about {number_of_bytes(size)}")
        raise


def checkpoint_size(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint, about: the trained tensors in fp32, and the optimizer's states."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(4 * tensor.numel() for tensor in tensors) + sum(
        value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor)
    )


@contextmanager
def _written(checkpoint: Path, first: bool) -> Iterator[Path]:
    processes = PartialState()
    if first:
        _remove_unfinished(checkpoint.parent)
    with write_folder(checkpoint) if first else nullcontext(checkpoint) as partial:
        # The name has the first process's id in it.
        yield Path(broadcast_object_list([str(partial)])[0])
        processes.wait_for_everyone()
        if first:
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            manifest = {file.relative_to(partial).as_posix(): fingerprint(file) for file in files}
            write_json(partial / MANIFEST, manifest)
    processes.wait_for_everyone()


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for partial in folder.glob(".step-*.partial-*"):
        shutil.rmtree(partial)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose every file is as its manifest says, oldest first."""
    return [entry for entry in sorted(folder.glob("step-*")) if entry.name[5:].isdecimal() and _is_complete(entry)]


def _is_complete(checkpoint: Path) -> bool:
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files: dict[str, Any] = dict(json.loads(manifest.read_text()))
    except (ValueError, TypeError):  # half written
        return False
    return all(
        (checkpoint / name).is_file() and fingerprint(checkpoint / name) == facts for name, facts in files.items()
    )


def remove_old(folder: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest `keep`."""
    for checkpoint in complete_checkpoints(folder)[:-keep]:
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
    stored = load_file(checkpoint / TENSORS)
    if set(stored) != set(tensors):
        raise TrainingError(f"{checkpoint}: its tensors are not those that this recipe trains; start a new run")
    for name, tensor in stored.items():
        tensors[name].copy_(shard_like(tensors[name], tensor))
    objective: dict[str, Any] = read_json(checkpoint / OBJECTIVE)
    return objective


def save_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, folder: Path, first: bool
) -> None:
    """Write the state of an optimizer of sharded parameters with whole tensors: the `first` process, though all ask."""
    stored = optimizer.state_dict()
    stored["state"] = {
        place: {key: gather(value).cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
        for place, state in stored["state"].items()
    }
    if first:
        torch.save(stored, folder / OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / SCHEDULER)


def load_sharded_optimizer(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, checkpoint: Path
) -> None:
    """Read what `save_sharded_optimizer` wrote into an optimizer of sharded parameters, and its scheduler."""
    stored = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, state in stored["state"].items():
        like = parameters[place]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == like.shape:
                state[key] = shard_like(like, value)
    optimizer.load_state_dict(stored)
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))


def drop_states(optimizer: torch.optim.Optimizer, tensors: Iterable[nn.Parameter]) -> None:
    """Drop the optimizer's states of the tensors that are frozen now, which frees their memory."""
    for tensor in tensors:
        if not tensor.requires_grad:
            optimizer.state.pop(tensor, None)
