"""Patches that make a training step faster and smaller, each equal to the layer that it replaces."""

from transformers import PreTrainedModel, TrainingArguments

from llmtune.kernels import device
from llmtune.kernels.cpu.autocast import PendingGradients, patch_embedding, patch_linears
from llmtune.kernels.lora import patch_lora, skip_input_casts
from llmtune.kernels.recompute import patch_mlps, patch_norms


def install(model: PreTrainedModel, args: TrainingArguments) -> PendingGradients | None:
    """Patch a model's layers for a Trainer's `args`; on CPUs, returns the gradients to flush after each backward."""
    if args.bf16 or args.fp16:
        skip_input_casts(model)
    patch_lora(model)
    patch_norms(model)
    if not args.gradient_checkpointing:
        patch_mlps(model)
    return _install_on_cpu(model, args) if device.on_cpu(args.device) else None


def _install_on_cpu(model: PreTrainedModel, args: TrainingArguments) -> PendingGradients:
    """Patch what only CPUs gain from: one bf16 copy of a layer's input, and gradients that come late or sparse."""
    pending = PendingGradients()
    # Across processes, gradients are averaged as they come, in buffers for dense ones.
    alone = args.world_size == 1
    if args.bf16:
        patch_linears(model, pending if alone else None)
    if alone:
        patch_embedding(model)
    return pending
