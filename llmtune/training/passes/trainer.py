"""SplitSteps: a planned trainer that takes the rows of an optimizer step in passes that fit into memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn

from llmtune.data.batches.collate import TokenCounts
from llmtune.data.batches.order import EpochSampler
from llmtune.data.batches.passes import PassLimits
from llmtune.data.batches.rows import row_lengths
from llmtune.kernels.cpu.autocast import PendingGradients
from llmtune.kernels.cpu.copies import WeightCopies
from llmtune.training.passes.choice import RunPasses
from llmtune.training.passes.steps import Batch, PassRows, StepSampler, join_passes
from llmtune.training.planned import Planned


class SplitSteps(Planned):
    """A planned trainer whose batches are a process's rows of a whole step, whatever one pass may hold.

    The loss of a pass is a sum over its tokens / the tokens of the step: its gradients add up to those of one pass.
    """

    def __init__(
        self, model: nn.Module, *, grouped: bool = False, limits: PassLimits | None = None, **arguments: Any
    ) -> None:
        """`grouped` puts rows of like length into one step, which `limits` split; `arguments` go to Planned."""
        super().__init__(model, **arguments)
        self._grouped, self._limits = grouped, limits or PassLimits()
        self._step_counts = TokenCounts()
        self._pending: PendingGradients | None = None
        self._copies: WeightCopies | None = None

    def get_train_dataloader(self) -> DataLoaderShard:
        """Batches of this process, in an order that follows from seed and epoch alone; each is made one ahead."""
        args, rows = self.args, self.train_dataset
        sampler = EpochSampler(row_lengths(rows), self._rows_per_step(), args.seed, self._grouped)
        process = (args.process_index, args.world_size)
        batches = StepSampler(rows, sampler, self._limits, args.train_batch_size, *process)
        options = {"collate_fn": join_passes, "pin_memory": args.dataloader_pin_memory}
        return DataLoaderShard(PassRows(rows, self.data_collator), batch_sampler=batches, **options)

    @property
    def passes(self) -> RunPasses:
        """The passes of this training, which its checkpoints record."""
        return RunPasses(self._limits, bool(self.args.gradient_checkpointing))

    def _rows_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def begin_plan(self) -> None:
        """Prepare the model for stages, and let a step clear the gradients of what trains, without a walk over all."""
        super().begin_plan()
        model: nn.Module = self.model_wrapped
        vars(model)["zero_grad"] = self.optimizer.zero_grad

    def begin_step(self, step: int) -> None:
        """Enter the stage of a step; weights, which may have changed in any way, are cast anew in it."""
        super().begin_step(step)
        if self._copies is not None:
            self._copies.begin_step()

    def end_plan(self) -> None:
        """Let the model clear its gradients itself again, and keep no copy of a weight."""
        model: nn.Module = self.model_wrapped
        vars(model).pop("zero_grad", None)
        if self._copies is not None:
            self._copies.drop()
        super().end_plan()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int | None]:
        """The batches of the next step, and how many tokens they teach in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(batch["supervised"] for batch in batches) if batches else None

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The forward and backward passes of a batch; gives their loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        last = len(inputs["passes"]) - 1
        for number, rows in enumerate(inputs["passes"]):
            counted = replace(self._step_counts)
            with self._accumulating(model) if number < last else nullcontext():
                total += self._pass(model, rows, num_items_in_batch)
            if number == last and inputs["idle"]:
                self._step_counts = counted
        return total

    def _pass(
        self, model: nn.Module, rows: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The loss of a forward and backward pass over collated rows; what is no tensor stays on the CPU."""
        device = self.args.device
        inputs = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in rows.items()
        }
        loss: torch.Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        if self._pending is not None:
            self._pending.flush()
        return loss.detach()

    def _accumulating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let each process add up gradients of its own, but those of sharded weights, which would lie there whole."""
        return nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)
