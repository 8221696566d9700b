"""Patches that make a training step faster and smaller, each equal to the layer that it replaces."""

from transformers import PreTrainedModel, TrainingArguments

from llmtune.kernels import device
from llmtune.kernels.cpu.autocast import PendingGradients, patch_embedding, patch_linears
from llmtune.kernels.cpu.copies import WeightCopies
from llmtune.kernels.lora import patch_lora, skip_input_casts
from llmtune.kernels.recompute import patch_mlps, patch_norms


def install(
    model: PreTrainedModel, args: TrainingArguments, copies: WeightCopies | None = None
) -> PendingGradients | None:
    """Patch a model's layers for a Trainer's `args`; on CPUs, returns the gradients to flush after each backward.

    CPUs cast the weights that train into `copies`, once after each of its `begin_step`.
    """
    if args.bf16 or args.fp16:
        skip_input_casts(model)
    patch_lora(model)
    patch_norms(model)
    if not args.gradient_checkpointing:
        patch_mlps(model)
    return _install_on_cpu(model, args, copies) if device.on_cpu(args.device) else None


def _install_on_cpu(model: PreTrainedModel, args: TrainingArguments, copies: WeightCopies | None) -> PendingGradients:
    """Patch what only CPUs gain from: one bf16 copy of a layer's input, and gradients that come late or sparse."""
    pending = PendingGradients()
    # Across processes, gradients are averaged as they come, in buffers for dense ones.
    alone = args.world_size == 1
    if args.bf16:
        patch_linears(model, pending if alone else None, copies)
    if alone:
        patch_embedding(model)
    return pending
