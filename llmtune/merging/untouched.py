"""Proves that what text does not pass, such as a vision tower, is in a merged folder as the base's files have it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.errors import ProofError
from llmtune.model.base import Base
from llmtune.model.blocks import distances, text_model
from llmtune.model.files.stored import StoredTensor, stored_tensors


def beyond_text(model: PreTrainedModel) -> list[str]:
    """The names, as files have them, of the tensors that text does not pass; empty for a model of text alone."""
    distance = distances(model)
    reached = {id(parameter) for name, parameter in model.named_parameters() if name in distance}
    reached |= {id(buffer) for buffer in text_model(model).buffers()}
    rest = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in reached}
    return sorted(revert_weight_conversion(model, {name: tensor.detach().to("meta") for name, tensor in rest.items()}))


def count_kept(names: list[str], base: Base, folder: Path, dtype: torch.dtype) -> int:
    """Count tensors of a merged folder that equal the base's, rounded to `dtype`, bit by bit.

    Raises ProofError where one of these names is missing, or differs.
    """
    before, after = stored_tensors(base.folder, base.name), stored_tensors(folder, str(folder))
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name in names:
            if name not in before or name not in after:
                side = "the merged folder" if name in before else base.name
                raise ProofError(f"{name}, which text does not pass, is not stored in {side}; nothing was merged")
            kept, merged = (_read(name, stored[name], files, stack) for stored in (before, after))
            if kept.is_floating_point():
                kept = kept.to(dtype)
            if kept.dtype != merged.dtype or not torch.equal(kept, merged):
                raise ProofError(f"{name}, which text does not pass, changed in the merged folder; nothing was merged")
    return len(names)


def _read(name: str, stored: StoredTensor, files: dict[Path, Any], stack: ExitStack) -> torch.Tensor:
    if stored.file not in files:
        files[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
    tensor: torch.Tensor = files[stored.file].get_tensor(name)
    return tensor
