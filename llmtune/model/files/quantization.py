"""How the weights of a base are quantized in its files, and what their tensors are once they are dequantized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from llmtune.errors import FieldError
from llmtune.model.files.stored import StoredTensor

HOW_QUANTIZED = ("quantization_config", "compression_config")
_DEQUANTIZED = {"mxfp4": "MXFP4", "fp8": "fp8"}
"""What transformers turns into 16 bits as it loads it, on any device and without other packages."""
_FP8 = "F8_E4M3"
_FP8_SCALES = ("_scale_inv", "scale", "qscale_weight")
"""What a name ends in that a scale has: after the weight's name, or in place of the word weight in it."""
_NUMBERS_PER_BYTE = 2
_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}

Tensors = dict[str, StoredTensor]


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the weights of a base are quantized in its files, as its configuration says; None where they are not."""
    named = (getattr(config, key, None) for key in HOW_QUANTIZED)
    stored = next((how for how in named if how is not None), None)
    if stored is None:
        return None
    return dict(stored) if isinstance(stored, Mapping) else dict(stored.to_dict())


def dequantized_format(config: PreTrainedConfig) -> str | None:
    """The format that a base's weights are dequantized from as they are loaded; None for any other base."""
    return _DEQUANTIZED.get(str((stored_quantization(config) or {}).get("quant_method")))


def kept_bits(config: PreTrainedConfig) -> int | None:
    """The bits of bitsandbytes in which a base's weights are stored, and stay in memory; None for any other base."""
    stored = stored_quantization(config) or {}
    if stored.get("quant_method") != "bitsandbytes":
        return None
    return next((bits for key, bits in _BITS.items() if stored.get(key)), None)


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration for weights that are not quantized."""
    return type(config).from_dict({key: value for key, value in config.to_dict().items() if key not in HOW_QUANTIZED})


def dequantized_tensors(tensors: Tensors, name: str) -> Tensors:
    """The tensors under the names and shapes that they have in 16 bits, each packed one with its scales as one.

    One without its scales stays as it is. Raises FieldError for scales that do not divide their tensor.
    """
    folded = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith("_blocks") and (scales := f"{key.removesuffix('_blocks')}_scales") in tensors:
            del folded[key], folded[scales]
            folded[key.removesuffix("_blocks")] = _unpacked(tensor)
        elif tensor.dtype == _FP8 and (scale := _scale_of(key, tensors)):
            _refuse_uneven(key, tensor, tensors[scale], name)
            folded.pop(scale)
            folded.pop(f"{key.removesuffix('weight')}activation_scale", None)
    return folded


def refuse_unscaled(tensors: Tensors, name: str) -> None:
    """Raise FieldError for a tensor in fp8 without scales, whose numbers would be taken for the weights."""
    bare = next((key for key, one in tensors.items() if one.dtype == _FP8 and not _scale_of(key, tensors)), None)
    if bare:
        raise FieldError(
            "model.base", f"{name}: its files lack the scales of {bare}, which is in fp8; download it again"
        )


def _unpacked(blocks: StoredTensor) -> StoredTensor:
    """What MXFP4's blocks (experts, out, groups, bytes) are: (experts, in, out)."""
    *experts, out, groups, width = blocks.shape
    return dataclasses.replace(blocks, shape=[*experts, groups * width * _NUMBERS_PER_BYTE, out], dtype="MXFP4")


def _scale_of(key: str, tensors: Tensors) -> str | None:
    names = [key + _FP8_SCALES[0], *(key.removesuffix("weight") + end for end in _FP8_SCALES[1:])]
    return next((name for name in names if name in tensors), None)


def _refuse_uneven(key: str, tensor: StoredTensor, scales: StoredTensor, name: str) -> None:
    """Raise FieldError where transformers could not tell which numbers a scale is for."""
    grid = scales.shape[-2:] if len(scales.shape) > 1 else []
    if any(size % parts for size, parts in zip(tensor.shape[-2:], grid, strict=False)):
        message = f"{name}: {key} is {tensor.shape}, which its scales {scales.shape} do not divide"
        raise FieldError("model.base", f"{message}, so it cannot be dequantized; name the 16-bit model")
