"""Checkpoints that are complete or absent: what a training run writes, finds again and goes on from."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from llmtune.errors import TrainingError
from llmtune.files import fingerprint, write_json
from llmtune.frozen.cache import FrozenBlocks
from llmtune.model.sharded import gather, shard_like
from llmtune.train.proof import checksums

TENSORS = "trained.safetensors"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


class Checkpointed(SFTTrainer):
    """SFTTrainer whose checkpoints hold what trains, and are complete or absent."""

    frozen_blocks: FrozenBlocks | None
    _names: list[str]
    _keep: int
    _kept_before: list[int] | None
    _seen: int
    _supervised: int

    def current_tensors(self) -> dict[str, nn.Parameter]:
        live = dict(self.model.named_parameters())
        return {name: live[name] for name in self._names}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"step-{step:06d}"
        partial_folder = folder.with_name(f".partial-{folder.name}")
        self.assert_replicas_equal()
        trained = self.trained_state()
        if self.args.should_save:
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            save_file(trained, partial_folder / TENSORS)
        self.accelerator.wait_for_everyone()
        self._save_optimizer_and_scheduler(str(partial_folder))
        self._save_rng_state(str(partial_folder))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(partial_folder / "trainer_state.json"))
            counts = {"seen": self._seen, "supervised": self._supervised}
            kept = self.frozen_blocks.kept if self.frozen_blocks else []
            write_json(partial_folder / "counts.json", {**counts, "frozen_blocks": kept})
            seal(partial_folder, folder)
            for old in complete_checkpoints(folder.parent)[: -self._keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name, on the CPU, in fp32: for the first process, though each must ask."""
        state = {}
        for name, tensor in self.current_tensors().items():
            full = gather(tensor.detach())
            if self.args.process_index == 0:
                state[name] = full.cpu().float().contiguous()
        return state

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Accelerate's way wants a state for every parameter, and those of later stages have none yet.
        stored = self.optimizer.state_dict()
        stored["state"] = {
            place: {
                key: gather(value).cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()
            }
            for place, state in stored["state"].items()
        }
        if self.args.should_save:
            torch.save(stored, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        stored = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for place, state in stored["state"].items():
            like = parameters[place]
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == like.shape:
                    state[key] = shard_like(like, value)
        self.optimizer.load_state_dict(stored)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        live = self.current_tensors()
        stored = load_file(Path(resume_from_checkpoint) / TENSORS)
        if set(stored) != set(live):
            raise TrainingError(f"{resume_from_checkpoint}: holds other tensors than this recipe trains")
        with torch.no_grad():
            for name, tensor in stored.items():
                live[name].copy_(shard_like(live[name], tensor))
        counts = json.loads((Path(resume_from_checkpoint) / "counts.json").read_text())
        first = self.args.process_index == 0
        self._kept_before = counts["frozen_blocks"]
        self._seen, self._supervised = (counts["seen"], counts["supervised"]) if first else (0, 0)

    def assert_replicas_equal(self) -> None:
        """Raise TrainingError where the processes hold different trained weights."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # A tensor that is sharded has no second copy.
        mine = checksums({name: p for name, p in self.current_tensors().items() if not isinstance(p, DTensor)})
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        odd = [name for name in mine if any(other[name] != mine[name] for other in everyone)]
        if odd:
            raise TrainingError(f"the processes' weights differ at step {self.state.global_step}: {odd[0]}")


def seal(partial_folder: Path, folder: Path) -> None:
    """Make a written checkpoint folder complete: every file on disk, the manifest last, then one rename."""
    files = sorted(file for file in partial_folder.rglob("*") if file.is_file())
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    write_json(
        partial_folder / MANIFEST, {file.relative_to(partial_folder).as_posix(): fingerprint(file) for file in files}
    )
    if folder.exists():
        shutil.rmtree(folder)
    partial_folder.rename(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose every file is there as its manifest says, oldest first."""
    return [checkpoint for checkpoint in sorted(folder.glob("step-*")) if _is_complete(checkpoint)]


def _is_complete(checkpoint: Path) -> bool:
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files: dict[str, Any] = json.loads(manifest.read_text())
    except ValueError:  # half written
        return False
    return all(
        (checkpoint / name).is_file() and fingerprint(checkpoint / name) == facts for name, facts in files.items()
    )
