"""GGUF's types: which one each tensor gets, and its values in it."""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize

_FILE_TYPES = {"F32": "ALL_F32"}


def type_of(kind: str, shape: list[int]) -> GGMLQuantizationType:
    """The type of a tensor in a file of `kind`: vectors stay in F32; rows that no whole blocks fill, in BF16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.BF16


def file_type(kind: str) -> LlamaFileType:
    """The number by which a file says what most of its tensors are."""
    return LlamaFileType[_FILE_TYPES.get(kind.upper(), f"MOSTLY_{kind.upper()}")]


def stored_bytes(kind: str, shape: list[int]) -> int:
    """How many bytes a tensor takes in a file of `kind`."""
    block, size = GGML_QUANT_SIZES[type_of(kind, shape)]
    return int(np.prod(shape)) // block * size


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Values (float32) as a file of `kind` stores them: floats, or bytes of blocks."""
    with np.errstate(over="ignore"):  # what f16 cannot hold is told by the caller
        return quantize(np.ascontiguousarray(values), type_of(kind, list(values.shape)))


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Values (float32) as they are read back from a file of `kind`."""
    return dequantize(stored(values, kind), type_of(kind, list(values.shape)))
