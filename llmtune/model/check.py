"""Compares a base's files with the model that its configuration describes, before any weight or row is read."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.errors import FieldError
from llmtune.model.base import Base
from llmtune.model.files.fingerprints import base_files
from llmtune.model.files.report import refuse_differences
from llmtune.model.files.stored import INDEX, SINGLE, StoredTensor, refuse_damaged, stored_tensors, weight_files
from llmtune.model.reading import reading

_QUANTIZED = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".quant_state.")
"""What bitsandbytes stores beside a weight in 4 bits."""


_HOW_QUANTIZED = ("quantization_config", "compression_config")


class UnreadTensor:
    """Takes the place of a stored tensor, as transformers slices and loads it, without reading it."""

    def __init__(self, shape: list[int]) -> None:
        """Take the stored tensor's shape."""
        self._shape = shape

    def __getitem__(self, index: object) -> "UnreadTensor":
        """The same, as transformers always takes the whole."""
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the shape on the meta device."""
        return torch.empty(self._shape, dtype=dtype, device="meta")


def check_base(base: Base, skeleton: PreTrainedModel) -> None:
    """Raise FieldError where the files of a base on this machine are damaged, or are not the tensors of its skeleton.

    transformers itself loads them, with nothing in them: only names and shapes are read. A base whose weights are not
    on this machine is not checked.
    """
    for file in base_files(base.folder):
        refuse_damaged(file, base.name)
    if has_weights(base):
        tensors = stored_tensors(base.folder, base.name)
        if stored_quantization(skeleton.config) is not None:
            tensors = _as_before_quantization(tensors, skeleton)
        refuse_differences(base.name, _report(base, skeleton, tensors))


def has_weights(base: Base) -> bool:
    """Whether the base's weights are on this machine; of a Hub id, all but them may be."""
    if base.name != base.hub_id:
        return True
    named = any((base.folder / name).is_file() for name in (SINGLE, INDEX))
    return named and all(file.is_file() for file in weight_files(base.folder, base.name))


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the weights of a base are quantized in its files, as its configuration says; None where they are not."""
    named = (getattr(config, key, None) for key in _HOW_QUANTIZED)
    stored = next((how for how in named if how is not None), None)
    if stored is None:
        return None
    return dict(stored) if isinstance(stored, Mapping) else dict(stored.to_dict())


def check_stored(name: str, stored: dict[str, Any], wants: dict[str, bool]) -> None:
    """Raise FieldError for weights that are stored quantized and cannot be trained on so, or not as the recipe wants.

    `wants` tells by key of the recipe whether it wants what such a base cannot give.
    """
    method = str(stored.get("quant_method"))
    if method != "bitsandbytes" or not stored.get("load_in_4bit"):
        message = f"{name} is stored quantized ({method}); only 16 and 32 bits, and 4 bits of bitsandbytes, train"
        raise FieldError("model.base", f"{message}; name the model that it was made from")
    reasons = {
        "method.adapter": "its weights cannot train; add an adapter, such as lora",
        "model.quantize": "it needs no quantize; remove that key",
        "memory.frozen_blocks": "its blocks cannot be streamed; try auto",
        "merge.enabled": "no delta can be merged into it; set false, or name the model that it was made from",
    }
    for key, reason in reasons.items():
        if wants[key]:
            raise FieldError(key, f"{name} is stored in 4 bits (bitsandbytes), so {reason}")


def _report(base: Base, skeleton: PreTrainedModel, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """What transformers reports of loading tensors of these names and shapes."""
    config = skeleton.config
    if stored_quantization(config) is not None:
        plain = {key: value for key, value in config.to_dict().items() if key not in _HOW_QUANTIZED}
        config = type(config).from_dict(plain)
    try:
        _, report = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict={key: UnreadTensor(tensor.shape) for key, tensor in tensors.items()},
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    except RuntimeError as error:
        # Stored tensors that are merged while they are loaded do not fit together: experts, most of the time.
        with reading(base.name, "its weights"):
            expected = revert_weight_conversion(skeleton, skeleton.state_dict())
            tied = set(skeleton.all_tied_weights_keys)
            missing = {key for key in expected if key not in tensors and key not in tied}
            refuse_differences(base.name, {"missing_keys": missing, "mismatched_keys": _reshaped(expected, tensors)})
            raise error
    return dict(report)


def _reshaped(expected: dict[str, torch.Tensor], tensors: dict[str, StoredTensor]) -> list[tuple[str, Any, Any]]:
    both = ((key, tensors[key].shape, list(tensor.shape)) for key, tensor in expected.items() if key in tensors)
    return [(key, stored, shape) for key, stored, shape in both if stored != shape]


def _as_before_quantization(tensors: dict[str, StoredTensor], skeleton: PreTrainedModel) -> dict[str, StoredTensor]:
    """The tensors without what bitsandbytes stores beside a weight, each packed weight in its original shape."""
    shapes = {key: list(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    return {
        key: StoredTensor(tensor.file, shapes.get(key, tensor.shape), tensor.dtype) if tensor.dtype == "U8" else tensor
        for key, tensor in tensors.items()
        if not any(mark in key for mark in _QUANTIZED)
    }
