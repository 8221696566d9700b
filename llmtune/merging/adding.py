"""Adds a delta to the weights of its base: in fp32, a block at a time where the adapter allows it, then rounded."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from llmtune.errors import ProofError, lacks_memory
from llmtune.kernels.finite import is_finite
from llmtune.merging.compact import in_fp32, units, widen_buffers, widened_units
from llmtune.merging.proof import logits
from llmtune.model.base import Base, load_config, load_model
from llmtune.model.blocks import is_tied
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.files.stored import stored_tensors
from llmtune.model.kinds import auto_class

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Ids: TypeAlias = list[list[int]]
Tuned: TypeAlias = PreTrainedModel | PeftModel


def load_compact(base: Base, ids: Ids) -> tuple[PreTrainedModel, torch.Tensor]:
    """Load a base in the dtype of its files, and compute its logits in fp32; in fp32 where it cannot compute so."""
    kinds = {tensor.dtype for tensor in stored_tensors(base.folder, base.name).values()}
    if dequantized_format(load_config(base)):
        kinds = {"BF16"}  # what they are dequantized to
    if kinds <= {"BF16"} or kinds <= {"F16"}:
        try:
            weights = load_model(base, _DTYPES[kinds.pop()])
            weights = widen_buffers(weights, auto_class(weights.config))
            return weights, fp32_logits(weights, ids)
        except (RuntimeError, KeyError) as error:  # a model whose blocks read weights of other blocks
            if lacks_memory(error):
                raise
    weights = load_model(base)
    return weights, logits(weights, ids)


def fp32_logits(model: Tuned, ids: Ids) -> torch.Tensor:
    """Return a model's logits on texts, computed in fp32 whatever its weights are stored in."""
    with in_fp32(model):
        return logits(model, ids)


def add_delta(tuned: Tuned, dtype: torch.dtype, ids: Ids) -> tuple[PreTrainedModel, torch.Tensor]:
    """Add what was trained to the weights and round them to `dtype`; returns also the logits before rounding.

    Raises ProofError for an adapter on one of two tied matrices.
    """
    refuse_tied(tuned)
    layers = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]
    if any(type(layer).merge is BaseTunerLayer.merge for layer in layers):
        return _add_at_once(tuned, dtype, ids)
    with _adding(tuned, dtype):
        exact = logits(tuned, ids)
    merged: PreTrainedModel = tuned.unload() if isinstance(tuned, PeftModel) else tuned
    return merged.eval(), exact


def _add_at_once(tuned: Tuned, dtype: torch.dtype, ids: Ids) -> tuple[PreTrainedModel, torch.Tensor]:
    """Add an adapter that widens the model, which is then in fp32 as a whole."""
    for parameter in tuned.parameters():
        parameter.data = parameter.data.float()
    try:
        merged: PreTrainedModel = tuned.merge_and_unload().eval()
    except ValueError as error:  # weights that are not finite, too
        raise ProofError(str(error)) from error
    exact = logits(merged, ids)
    round_weights(merged, dtype)
    return merged, exact


@contextlib.contextmanager
def _adding(tuned: Tuned, dtype: torch.dtype) -> Iterator[None]:
    """Widen each unit of a model before it runs in the block, add its adapter, and round it after it has run.

    What several units share, such as the embeddings' matrix, is rounded at the end.
    """
    owners = Counter(parameter for unit in units(tuned) for parameter in unit.parameters())

    def open_unit(unit: nn.Module) -> None:
        for parameter in unit.parameters():
            parameter.data = parameter.data.float()
        add_adapters(unit)

    def close_unit(unit: nn.Module) -> None:
        if all(owners[parameter] == 1 for parameter in unit.parameters()):
            round_weights(unit, dtype)

    with widened_units(tuned, open_unit, close_unit):
        yield
    if idle := [name for name, one in tuned.named_modules() if isinstance(one, BaseTunerLayer) and not one.merged]:
        raise ProofError(f"{idle[0]} is adapted, but the model does not run it; adapt other layers")
    round_weights(tuned, dtype)


def add_adapters(unit: nn.Module) -> None:
    """Add the adapters in a unit to its weights, if there are any; raises ProofError where one is not finite then."""
    for name, module in unit.named_modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            module.merge()
            refuse_infinite(module.get_base_layer(), name)


def refuse_infinite(layer: nn.Module, name: str) -> None:
    """Raise ProofError for a weight that is not finite; texts that a proof reads need not reach it."""
    if not all(is_finite(parameter) for parameter in layer.parameters()):
        raise ProofError(f"{name}: its merged weights are not finite; the delta is damaged, or its training diverged")


def refuse_tied(tuned: Tuned) -> None:
    """Raise ProofError if an adapter changes one of two tied matrices."""
    if not isinstance(tuned, PeftModel):
        return
    base = tuned.get_base_model()
    if is_tied(base):
        tied = [base.get_input_embeddings(), base.get_output_embeddings()]
        adapted = [
            name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer) and module in tied
        ]
        if adapted:
            raise ProofError(
                f"{adapted[0]} is adapted, but embedding and head are one matrix in this model; adapt other layers"
            )


def round_weights(weights: nn.Module, dtype: torch.dtype) -> None:
    """Put every weight into `dtype`."""
    for parameter in weights.parameters():
        parameter.data = parameter.data.to(dtype)


def round_buffers(weights: nn.Module, dtype: torch.dtype) -> None:
    """Put every buffer of real numbers into `dtype`; complex ones, such as rotations, are never stored."""
    for buffer in weights.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
