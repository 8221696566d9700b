"""Compares a base's files with the model that its configuration describes, before any weight or row is read."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.errors import FieldError
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.files.fingerprints import base_files
from llmtune.model.files.locate import INTO
from llmtune.model.files.quantization import (
    dequantized_format,
    dequantized_tensors,
    kept_bits,
    refuse_unscaled,
    stored_quantization,
    without_quantization,
)
from llmtune.model.files.report import refuse_differences
from llmtune.model.files.stored import StoredTensor, holds_weights, refuse_damaged, stored_tensors
from llmtune.model.reading import reading

_BESIDE = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".quant_state.", ".SCB", ".weight_format")
"""What bitsandbytes stores beside a weight in 4 or 8 bits."""
_PACKED = ("U8", "I8")


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
        if dequantized_format(skeleton.config):
            refuse_unscaled(tensors, base.name)
            tensors = dequantized_tensors(tensors, base.name)
        elif kept_bits(skeleton.config):
            tensors = _as_before_quantization(tensors, skeleton)
        refuse_differences(base.name, _report(base, skeleton, tensors))


def has_weights(base: Base) -> bool:
    """Whether the base's weights are on this machine; of a Hub id, all but them may be."""
    return base.name != base.hub_id or holds_weights(base.folder, base.name)


def check_stored(name: str, config: PreTrainedConfig, wants: dict[str, bool]) -> None:
    """Raise FieldError for weights that are stored quantized and cannot be trained on so, or not as the recipe wants.

    `wants` tells by key of the recipe whether it wants what such a base cannot give.
    """
    stored, bits, dequantized = stored_quantization(config), kept_bits(config), dequantized_format(config)
    if stored is None:
        reasons = {"model.merge_into": "is for a base that is stored quantized, and {base} is not; remove that key"}
    elif bits:
        words = f"{{base}} is stored in {bits} bits (bitsandbytes), so "
        reasons = {
            "method.adapter": words + "its weights cannot train; add an adapter, such as lora",
            "model.quantize": words + "it needs no quantize; remove that key",
            "memory.frozen_blocks": words + "its blocks cannot be streamed; try auto",
            "merge.enabled": words + "no delta can be merged into it; set false, or name the 16-bit model that it was "
            "made from in model.merge_into",
        }
    elif dequantized:
        words = f"{{base}} is stored in {dequantized} and dequantized as it is loaded, so "
        reasons = {
            "model.quantize": words + "it cannot be quantized again; remove that key, or name its 16-bit model",
            "memory.frozen_blocks": words + "its blocks cannot be streamed; try auto",
        }
    else:
        message = f"{name} is stored quantized ({stored.get('quant_method')}); only 16 and 32 bits, fp8, MXFP4, and 4 "
        raise FieldError(
            "model.base", f"{message}or 8 bits of bitsandbytes, train; name the model that it was made from"
        )
    for key, reason in reasons.items():
        if wants[key]:
            raise FieldError(key, reason.format(base=name))


def check_same_shapes(base: Base, skeleton: PreTrainedModel, original: Base) -> None:
    """Raise FieldError where the model that a delta is to be merged into is not what the base was made from."""
    try:
        config = load_config(original)
        other = build_skeleton(original)
        check_base(original, other)
    except FieldError as error:
        raise FieldError(INTO, error.message, error.kind) from error
    if stored_quantization(config) is not None:
        raise FieldError(INTO, f"{original.name} is stored quantized itself; name the 16-bit model")
    ours, theirs = ({name: list(one.shape) for name, one in model.state_dict().items()} for model in (skeleton, other))
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            one, two = (f"{name} {shapes[name]}" if name in shapes else f"no {name}" for shapes in (ours, theirs))
            message = f"{original.name} is not the model that {base.name} was made from: it has {two}, the base {one}"
            raise FieldError(INTO, message)


def _report(base: Base, skeleton: PreTrainedModel, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """What transformers reports of loading tensors of these names and shapes."""
    config = skeleton.config
    if stored_quantization(config) is not None:
        config = without_quantization(config)
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
    state = skeleton.state_dict()
    shapes = {key: list(one.shape) for key, one in {**state, **revert_weight_conversion(skeleton, state)}.items()}
    return {
        key: StoredTensor(tensor.file, shapes.get(key, tensor.shape), tensor.dtype)
        if tensor.dtype in _PACKED
        else tensor
        for key, tensor in tensors.items()
        if not any(mark in key for mark in _BESIDE)
    }
