"""Writes a folder of merged weights as one GGUF file, a tensor at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape
from safetensors import safe_open
from transformers import PreTrainedConfig

from llmtune.errors import MachineError, ProofError
from llmtune.exporting.gguf.architecture import HOW, add_sizes, architecture_name, rope_factors, row_order
from llmtune.exporting.gguf.types import file_type, stored, stored_bytes, type_of
from llmtune.exporting.gguf.vocabulary import Vocabulary
from llmtune.model.files.report import COMPUTED
from llmtune.model.files.stored import StoredTensor, stored_tensors
from llmtune.working import working

HEAD = "lm_head.weight"
ROPE = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the merged weights: its names there and in GGUF."""

    source: str
    name: str
    stored: StoredTensor


def named_tensors(folder: Path, config: PreTrainedConfig, base: str) -> list[Tensor]:
    """The tensors of a folder of weights with llama.cpp's names; raises MachineError for one that it has no name for.

    `base` names the folder in messages. A head that is the embeddings is left out.
    """
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture_name(config))
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for source, tensor in stored_tensors(folder, base).items():
        if COMPUTED.search(source) or (source == HEAD and config.tie_word_embeddings):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MachineError(f"llama.cpp has no name for {source} of {config.model_type}; {HOW}")
        tensors.append(Tensor(source, name, tensor))
    return tensors


def write_gguf(
    folder: Path, file: Path, kind: str, name: str, config: PreTrainedConfig, vocabulary: Vocabulary
) -> dict[str, int]:
    """Write the weights of `folder` to a GGUF file and return how many tensors it has of each type.

    Raises ProofError for a value that the type cannot hold.
    """
    tensors = named_tensors(folder, config, str(folder))
    writer = GGUFWriter(file, architecture_name(config))
    try:
        writer.add_type("model")
        writer.add_name(name)
        add_sizes(writer, config)
        writer.add_file_type(file_type(kind))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        vocabulary.add(writer)
        if (factors := rope_factors(config)) is not None:
            writer.add_tensor_info(ROPE, list(factors.shape), factors.dtype, factors.nbytes)
        for tensor in tensors:
            _announce(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        with working(f"writing {file.name}", len(tensors), "tensors") as step:
            for tensor in tensors:
                writer.write_tensor_data(_values(tensor, kind, config))
                step()
    finally:
        writer.close()
    kinds = [type_of(kind, tensor.stored.shape).name for tensor in tensors]
    return {one: kinds.count(one) for one in sorted(set(kinds))}


def _announce(writer: GGUFWriter, tensor: Tensor, kind: str) -> None:
    """Write a tensor's shape and type into the file's header."""
    shape, quantized = tensor.stored.shape, type_of(kind, tensor.stored.shape)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    dtype = np.dtype(plain.get(quantized, np.uint8))
    stored_shape = shape if quantized in plain else quant_shape_to_byte_shape(shape, quantized)
    writer.add_tensor_info(tensor.name, stored_shape, dtype, stored_bytes(kind, shape), quantized)


def _values(tensor: Tensor, kind: str, config: PreTrainedConfig) -> np.ndarray:
    """A tensor's values in the order and the type of the file; raises ProofError for one that the type cannot hold."""
    with safe_open(tensor.stored.file, framework="pt") as weights:
        values: torch.Tensor = weights.get_tensor(tensor.source)
    order = row_order(architecture_name(config), config, tensor.name, len(values))
    numbers = values.float().numpy()
    result = stored(numbers if order is None else numbers[order], kind)
    if result.dtype == np.float16 and not np.isfinite(result).all():
        largest = float(np.abs(numbers).max())
        raise ProofError(f"{tensor.source} holds {largest:.3g}, which f16 cannot; export gguf:bf16")
    return result
