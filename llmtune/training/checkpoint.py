"""Checkpoints that are complete or absent: a folder that all processes fill, with a manifest written last."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from operator import call
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.errors import MachineError, TrainingError
from llmtune.files import fingerprint, finish, read_json, remove_at_once, write_folder, write_json
from llmtune.machine import processes
from llmtune.model.sharded import shard_like
from llmtune.numbers import size as number_of_bytes
from llmtune.working import working

TENSORS = "trained.safetensors"
OBJECTIVE = "objective.json"
MANIFEST = "manifest.json"
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


class Draft:
    """A checkpoint that is being written: its folder, whose files are put on disk and hashed beside the next one."""

    def __init__(self, folder: Path, threads: ThreadPoolExecutor) -> None:
        self.folder, self._threads = folder, threads
        self._seals: dict[str, Future[dict[str, Any]]] = {}

    def seal(self, name: str) -> None:
        """Put a file on disk and hash it, in a thread: its content is final."""
        self._seals[name] = self._threads.submit(_sealed, self.folder / name)

    def manifest(self) -> dict[str, Any]:
        """The fingerprints of all files, by name, once they are on disk."""
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        for name in files.keys() - self._seals.keys():
            self.seal(name)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        with working("sealing the checkpoint", sum(sizes.values()), "bytes", on_terminal=False) as step:
            manifest = {}
            for name in sorted(files):
                manifest[name] = self._seals[name].result()
                step(sizes[name])
        return manifest


def _sealed(file: Path) -> dict[str, Any]:
    finish(file)
    return fingerprint(file)


@contextmanager
def write_checkpoint(
    checkpoint: Path,
    first: bool,
    size: int = 0,
    keep: tuple[int, int | None] | None = None,
    then: Callable[[Callable[[], None]], None] = call,
) -> Iterator[Draft]:
    """A draft that every process fills; the `first` one then writes the manifest and gives the folder its name.

    `size` is how many bytes it takes, about; raises MachineError where the disk has less, and an error notes it. `keep`
    says which others stay: so many of the newest, and the one after a step. `then` is given what completes the
    checkpoint, once it is filled; of several processes, each must call it at once.
    """
    if first:
        _remove_unfinished(checkpoint.parent)
    if lack := processes.broadcast(_lack_of_room(checkpoint.parent, size) if first else None):
        raise MachineError(lack)
    with _noting(size), ExitStack() as stack:
        yield stack.enter_context(_written(checkpoint, first))
        completing = stack.pop_all()

    def complete() -> None:
        with _noting(size):
            completing.close()
        if first:
            _VERIFIED[checkpoint.absolute()] = _stamps(checkpoint)
        if first and keep:
            remove_old(checkpoint.parent, *keep)

    then(complete)


@contextmanager
def _noting(size: int) -> Iterator[None]:
    """Note on what is raised how many bytes a checkpoint takes."""
    try:
        yield
    except Exception as error:
        if size:
            error.add_note(f"a checkpoint takes about {number_of_bytes(size)}")
        raise


def checkpoint_size(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of a checkpoint, about: the trained tensors in fp32, and the optimizer's states; whole, where sharded."""
    states = (value for state in (optimizer.state.values() if optimizer else ()) for value in state.values())
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
def _written(checkpoint: Path, first: bool) -> Iterator[Draft]:
    with ExitStack() as stack:
        folder = stack.enter_context(write_folder(checkpoint)) if first else checkpoint
        # Hashing and syncing leave the interpreter free.
        threads = stack.enter_context(ThreadPoolExecutor(4))
        # The folder that is filled has a random name.
        draft = Draft(Path(processes.broadcast(str(folder))), threads)
        yield draft
        processes.wait()
        if first:
            write_json(folder / MANIFEST, draft.manifest())
    processes.wait()


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write or to remove."""
    for partial in folder.glob(".step-*.partial-*"):
        shutil.rmtree(partial)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose every file is as its manifest says, on every machine, oldest first.

    Every process must ask; the first one on each machine hashes them, and no other one. One that this process sealed or
    hashed before is not read again, unless a file in it changed since.
    """
    mine = {checkpoint.name for checkpoint in _complete_here(folder)} if processes.is_first_here() else None
    answers = [names for names in processes.gather(mine) if names is not None]
    return sorted((folder / name for name in set.intersection(*answers)), key=checkpoint_step)


def _complete_here(folder: Path) -> list[Path]:
    """The complete checkpoints as this process sees them, oldest first."""
    named = (entry for entry in folder.glob("step-*") if entry.name[5:].isdecimal())
    return [entry for entry in sorted(named, key=checkpoint_step) if _is_complete(entry)]


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
            remove_at_once(checkpoint)


def save_state(draft: Draft, tensors: dict[str, torch.Tensor], objective: dict[str, Any]) -> None:
    """Write the trained tensors and the objective's state into a checkpoint."""
    save_file(tensors, draft.folder / TENSORS)
    draft.seal(TENSORS)
    write_json(draft.folder / OBJECTIVE, objective)


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
