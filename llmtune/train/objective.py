"""The loss of a batch: over its supervised tokens, without padding where that is equal, and never not a number."""

from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from llmtune.errors import TrainingError
from llmtune.kernels.cpu.attention import AttentionRouter, JoinedRows, short_row_attention
from llmtune.kernels.cpu.autocast import PendingGradients
from llmtune.kernels.cpu.cross_entropy import cross_entropy
from llmtune.train.joined import RowJoiner, arguments


class Measured(SFTTrainer):
    """SFTTrainer whose loss is the mean over the supervised tokens of a whole optimizer step."""

    _unpadded: RowJoiner
    _attention: AttentionRouter | None = None
    _held: PendingGradients | None = None
    _seen: int
    _supervised: int
    _step_seen: int
    _step_slots: int

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Train as the plan says; rows that are short are attended to in the way that suits this machine."""
        with short_row_attention() as self._attention:
            given = super().train(*arguments, **named)
        self._attention = None
        return given

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy over supervised tokens / `num_items_in_batch`; the head sees supervised positions alone."""
        labels, index = inputs.pop("labels"), inputs.pop("index", None)
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1]
        if num_items_in_batch is not None and int(num_items_in_batch) == 0:
            raise TrainingError("a batch has no supervised token, so nothing can be learned from it")
        head = self.accelerator.unwrap_model(model, keep_torch_compile=False).get_output_embeddings()

        seen, slots = int(inputs["attention_mask"].sum()), labels.numel()
        inputs, joined = self._joined(inputs, None if index is None else index.tolist())
        if joined is not None:
            rows, columns, slots = torch.zeros_like(rows), joined.places(rows, columns), seen

        def supervised_only(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return arguments[0][rows, columns]

        hook = head.register_forward_pre_hook(supervised_only)
        try:
            with self.accelerator.autocast():
                outputs = model(**inputs, use_cache=False)
        finally:
            hook.remove()
        share = 1 / float(max(1, len(rows)) if num_items_in_batch is None else num_items_in_batch)
        loss = cross_entropy(outputs.logits, targets, share)
        if self.model.training:
            self._seen += seen
            self._step_seen += seen
            self._step_slots += slots
            self._supervised += len(rows)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _joined(
        self, inputs: dict[str, torch.Tensor], index: list[int] | None
    ) -> tuple[dict[str, torch.Tensor], JoinedRows | None]:
        """What the model takes for a batch, joined without padding where that is equal, and how it was joined."""
        rows = self._unpadded.rows(inputs, index, self._attention)
        if self._attention is not None:
            self._attention.rows = rows
        self._unpadded.give(index, inputs["input_ids"], rows)
        return (inputs if rows is None else arguments(inputs["input_ids"], rows)), rows

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """One forward and backward pass; raises TrainingError where the loss is not finite."""
        loss = super().training_step(*arguments, **named)
        if self._held is not None:
            self._held.flush()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the last checkpoint is kept. "
                "A lower method.lr is the usual remedy"
            )
        return loss
