"""Keeps what text does not pass, such as a vision tower, and proves that a merged folder has it as the base does."""

import re
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.errors import ProofError
from llmtune.model.base import Base
from llmtune.model.blocks import text_model
from llmtune.model.files.report import COMPUTED
from llmtune.model.files.stored import StoredTensor, stored_tensors


def beyond_text(model: PreTrainedModel, distance: Collection[str]) -> list[str]:
    """The names, as files have them, of the tensors that text does not pass; empty for a model of text alone.

    `distance` are the names of the parameters that have a distance.
    """
    reached = {id(parameter) for name, parameter in model.named_parameters() if name in distance}
    reached |= {id(buffer) for buffer in text_model(model).buffers()}
    rest = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in reached}
    return _as_stored(model, rest)


def left_out(model: PreTrainedModel, base: Base, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a base's files that transformers does not load, such as a head for several tokens, in `dtype`."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    stored = stored_tensors(base.folder, base.name)
    ignored = {name for name in stored if any(re.search(pattern, name) for pattern in patterns)}
    if not ignored:
        return {}
    names = sorted(name for name in ignored - {*_as_stored(model, model.state_dict())} if not COMPUTED.search(name))
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        return {name: _rounded(_read(name, stored[name], files, stack), dtype) for name in names}


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
            if merged.dtype != _rounded(kept, dtype).dtype or not torch.equal(_rounded(kept, dtype), merged):
                raise ProofError(f"{name}, which text does not pass, changed in the merged folder; nothing was merged")
    return len(names)


def _as_stored(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names under which transformers writes a model's tensors."""
    empty = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    return sorted(revert_weight_conversion(model, empty))


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _read(name: str, stored: StoredTensor, files: dict[Path, Any], stack: ExitStack) -> torch.Tensor:
    if stored.file not in files:
        files[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
    tensor: torch.Tensor = files[stored.file].get_tensor(name)
    return tensor
