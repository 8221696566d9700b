"""SupervisedTrainer: fine-tuning on rows whose prompt is masked; it owns rows, loss, counts and evaluation."""

from contextlib import nullcontext
from dataclasses import asdict, astuple
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from llmtune.data.batches.collate import TokenCounts, refuse_unlabelled
from llmtune.data.batches.order import shared_batches
from llmtune.errors import TrainingError
from llmtune.frozen.boundary import Span
from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels.attention import row_attention
from llmtune.kernels.cpu.copies import WeightCopies
from llmtune.kernels.cpu.cross_entropy import cross_entropy
from llmtune.kernels.head import Supervised, SupervisedHead
from llmtune.kernels.install import install
from llmtune.kernels.readings import Readings
from llmtune.machine.device import forked_rng
from llmtune.machine.precision import skipped
from llmtune.model.blocks import blocks, unwrap
from llmtune.model.sharded import gather, reshard
from llmtune.plan.stages import boundaries
from llmtune.run_log import Record
from llmtune.training.joining.joiner import RowJoiner
from llmtune.training.passes.trainer import SplitSteps
from llmtune.training.proof import REMEDY, check_validation
from llmtune.training.selection.answers import AnswerScore
from llmtune.working import working

Row = dict[str, Any]
"""input_ids and labels of equal length, and an index into the cached frozen blocks' rows."""


class SupervisedTrainer(SplitSteps):
    """A planned trainer whose loss is the mean over the supervised tokens of a whole optimizer step.

    It computes in the ways of `llmtune.kernels`, joins rows, and runs frozen blocks once per row.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        *,
        frozen_blocks: FrozenBlocks | None = None,
        answers: AnswerScore | None = None,
        copies: bool = False,
        **arguments: Any,
    ) -> None:
        """`answers` are scored at each validation; `copies` of weights are kept on CPUs; `arguments` go to SplitSteps.

        Weights that are sharded are not copied.
        """
        if frozen_blocks is not None:
            arguments["data_collator"] = frozen_blocks.expecting(arguments["data_collator"])
        super().__init__(model, **arguments)
        self.frozen_blocks, self._answers = frozen_blocks, answers
        self._cached_before: list[int] | None = None
        self.counts = TokenCounts()
        self.model_accepts_loss_kwargs = True  # the loss is the mean over a step's tokens already
        # Trainer's own log reads the device for every number.
        self.args.logging_strategy = IntervalStrategy.NO
        self._readings = Readings(self.args.device)
        self._step_loss = self._gradient_norm = torch.zeros((), device=self.args.device)
        self._copies = WeightCopies() if copies and not self.is_fsdp_enabled else None
        self._pending = install(model, self.args, self._copies)
        self._head = SupervisedHead(unwrap(model))
        self._joiner = RowJoiner(model, frozen_blocks, self.accelerator.autocast)
        self._told: set[str] = set()

    def train(self, resume_from_checkpoint: str | None = None, **named: Any) -> TrainOutput:
        """Train as the plan says; rows are attended to by the kernels that are made for them."""
        with row_attention() as self._joiner.router:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **named)
        self._joiner.router = None
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy over the supervised tokens of a Collator's batch / `num_items_in_batch`, or their number."""
        labels, rows, columns, counts = (inputs.pop(name) for name in ("labels", "rows", "columns", "counts"))
        index, lengths = inputs.pop("index", None), inputs.pop("lengths")
        count = max(1, len(rows)) if num_items_in_batch is None else num_items_in_batch
        refuse_unlabelled(count)
        targets, slots = labels[rows, columns + 1], counts.slots
        inputs, joined = self._joiner.prepare(inputs, index, lengths)
        self._tell_of_rows()
        if joined is not None:
            rows, columns, slots = torch.zeros_like(rows), joined.places(rows, columns), counts.seen
        with self._head.at(Supervised(rows, columns, targets)), self.accelerator.autocast():
            outputs = model(**inputs, use_cache=False)
        in_head = outputs.get("loss")
        loss = cross_entropy(outputs.logits, targets, 1 / count) if in_head is None else in_head / count
        if self.model.training:
            self._step_counts.add(TokenCounts(counts.seen, counts.supervised, slots))
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
            self._step_loss = self._step_loss + loss.detach()
        return (loss, outputs) if return_outputs else loss

    def _tell_of_rows(self) -> None:
        """Record why rows stay padded, once for each reason."""
        note = self._joiner.note
        if note is not None and note not in self._told:
            self._told.add(note)
            self._record({"step": self.state.global_step, "rows": note})

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self._gradient_norm

    def end_step(self) -> None:
        """Have the step's numbers read: late on a device, but before anything of the step is saved or validated.

        A loss or gradient that is not finite may be in the weights by then; it ends the training, which drops them.
        """
        mine, self._step_counts = self._step_counts, TokenCounts()
        loss, self._step_loss = self._step_loss, torch.zeros_like(self._step_loss)
        norm = torch.as_tensor(gather(self._gradient_norm), dtype=loss.dtype, device=loss.device)
        numbers, world, control = torch.stack([loss, norm]), self.accelerator.num_processes, self.control
        if world > 1:
            counts = [torch.full((), count, dtype=torch.float64, device=loss.device) for count in astuple(mine)]
            numbers = self.accelerator.reduce(torch.stack([*(numbers.double() / world), *counts]), "sum")
        self._readings.put(numbers, partial(self._take_numbers, self.step_record(), mine))
        # What a stage took of memory is measured with its last step's numbers, before the next one takes its own.
        ends = self.state.global_step in self.schedule.ends
        self._readings.settle(ends or control.should_save or control.should_evaluate or control.should_training_stop)

    def _take_numbers(self, entry: Record, counts: TokenCounts, numbers: list[float]) -> None:
        """Record a step's numbers; raises TrainingError where nothing was learned from it, or nothing can be."""
        loss, norm, *everyone = numbers
        counts = TokenCounts(*map(int, everyone)) if everyone else counts
        refuse_unlabelled(counts.supervised)
        # The scaler of fp16 skips a step whose gradients are not finite; else they are in every trained weight by now.
        if not isfinite(loss) or not (self.args.fp16 or isfinite(norm)):
            what = f"{loss:.4g} but the gradients' norm is {norm}" if isfinite(loss) else f"{loss}"
            remedy = REMEDY + ", or model.precision: fp32, which has a wider range than fp16" * self.args.fp16
            raise TrainingError(f"the loss is {what} at step {entry['step']}; the last checkpoint is kept. {remedy}")
        self.counts.add(counts)
        entry |= self.counts.record(counts) | skipped(self.args.fp16, norm)
        self._record({"step": entry["step"], "loss": loss, **entry, "grad_norm": norm})

    def objective_state(self) -> dict[str, Any]:
        """The counts, below which blocks outputs are cached, and the passes: a resumed run goes on with the same."""
        kept = self.frozen_blocks.kept if self.frozen_blocks else []
        return {"counts": asdict(self.counts), "frozen_blocks": kept, "passes": self.passes.to_json()}

    def load_objective_state(self, state: dict[str, Any]) -> None:
        """Take back what `objective_state` gave."""
        self.counts, self._cached_before = TokenCounts(**state["counts"]), state["frozen_blocks"]

    def evaluate(
        self,
        eval_dataset: list[Row] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean loss per supervised token over the evaluation rows; random state and mode stay as they are."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = (self.args.process_index, self.args.world_size, self.args.eval_batch_size)
        training = self.model.training
        self.model.eval()
        with forked_rng(self.args.device), torch.no_grad():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            batches = shared_batches(rows, *share, self.data_collator)
            with working("validating", len(batches), "batches", on_terminal=False) as count_batch:
                for batch in batches:
                    count = batch["counts"].supervised
                    loss = self.compute_loss(self.model, self._prepare_inputs(batch))
                    sums += torch.stack([loss.double() * count, torch.full_like(sums[1], count)])
                    count_batch()
            right = self._count_right()
        total, tokens, right = self.accelerator.reduce(torch.cat([sums, sums.new_tensor([right])]), "sum").tolist()
        reshard(self.model)
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_loss": total / max(1, tokens)}
        if self._answers:
            metrics[f"{metric_key_prefix}_score"] = right / self._answers.count
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        check_validation(total / max(1, tokens), self.state.global_step, self.state.max_steps, self._record)
        return metrics

    def _count_right(self) -> int:
        """How many of this process's validation rows the model answers as it should; 0 where none is answered."""
        if self._answers is None:
            return 0
        router = self._joiner.router
        with router.paused() if router else nullcontext(), self.accelerator.autocast():
            return self._answers.right(unwrap(self.model))

    def begin_plan(self) -> None:
        """Prepare the model for stages, and cache the outputs of frozen blocks where the coming steps gain by it."""
        super().begin_plan()
        if self.args.device.type == "cpu":
            # Accelerate would copy all logits to fp32; the loss does that a few rows at a time.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.frozen_blocks is None:
            return
        step: int = self.state.global_step
        message = self._cache_frozen_blocks(self.frozen_blocks, step)
        self._joiner.reset()  # not every block computed while rows were tried
        if message:
            self._record({"step": step, "frozen_blocks": message})

    def _cache_frozen_blocks(self, frozen_blocks: FrozenBlocks, step: int) -> str | None:
        """Cache what pays from `step` on, and give one line on it."""
        distance = {name: self.distance[name] for name in self._trained_names}
        self._boundaries = boundaries(self.schedule.plan, distance.values(), len(blocks(self.model)))
        starts = self.schedule.starts
        coming = [
            Span(boundary, self._rows_between(max(start, step), end))
            for boundary, start, end in zip(self._boundaries, starts, [*starts[1:], self.schedule.steps], strict=True)
            if end > step
        ]
        how = self.accelerator.autocast, self._cached_before, self._joiner.prepare
        return frozen_blocks.begin(self.model, coming, distance, *how)

    def _rows_between(self, start: int, end: int) -> int:
        """Rows, for training and validation, that pass through the model in steps `start` to `end`."""
        every = self.args.eval_steps if self.eval_dataset is not None else None
        checks = int(end // every - start // every) if every else 0
        return (end - start) * self._rows_per_step() + checks * (len(self.eval_dataset) if checks else 0)

    def enter_stage(self, step: int) -> None:
        """Let exactly what trains at `step` require gradients, and cached outputs stand in for what does not."""
        super().enter_stage(step)
        if self.frozen_blocks is not None:
            self.frozen_blocks.enter(self._boundaries[self.schedule.stage_at(step)])
        if step in self.schedule.starts:
            self._joiner.reset()

    def end_plan(self) -> None:
        """Let every block compute again."""
        self._readings.settle(True)
        super().end_plan()
        if self.frozen_blocks is not None:
            self.frozen_blocks.end()
