"""Architectures that the gguf package alone can write: their sizes in llama.cpp's terms, and the order of their rows.

Names of tensors are llama.cpp's, from the gguf package. Where llama.cpp stores rows in another order, transformers'
reader of GGUF files says which: its permutation is inverted here.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtune.errors import MachineError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types of transformers, and llama.cpp's names for them: those that were tried with llama.cpp itself."""
LLAMA3 = "llama3"
"""Rotary positions that are stretched, some more than others: the file holds by how much."""
HOW = (
    "llama.cpp's own converter may: git clone https://github.com/ggml-org/llama.cpp, "
    "pip install -r llama.cpp/requirements.txt, then add --llama-cpp llama.cpp"
)


def architecture_name(config: PreTrainedConfig) -> str:
    """llama.cpp's name of a model's architecture; raises MachineError where the gguf package alone cannot write it."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MachineError(f"the gguf package alone writes {known}, not {config.model_type}; {HOW}")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    special = {
        f"rotary positions of kind {rope.get('rope_type')}": rope.get("rope_type") not in (None, "default", LLAMA3),
        f"rotary positions on {rope.get('partial_rotary_factor')} of a head": rope.get("partial_rotary_factor", 1) != 1,
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        f"a window of {getattr(config, 'sliding_window', None)} tokens": bool(getattr(config, "sliding_window", None)),
    }
    for what, is_there in special.items():
        if is_there:
            raise MachineError(f"this {config.model_type} has {what}, which the gguf package alone cannot write; {HOW}")
    return ARCHITECTURES[config.model_type]


def head_size(config: PreTrainedConfig) -> int:
    """The width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_sizes(writer: "GGUFWriter", config: PreTrainedConfig) -> None:
    """Write what llama.cpp must know to build the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """By how much each rotary frequency is slowed (float32, half a head); None where none is."""
    if (config.rope_parameters or {}).get("rope_type", "default") == "default":
        return None
    slowed = ROPE_INIT_FUNCTIONS[LLAMA3](config, "cpu")[0].double().numpy()
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head_size(config), 2) / head_size(config))
    return (plain / slowed).astype(np.float32)


def row_order(architecture: str, config: PreTrainedConfig, name: str, rows: int) -> np.ndarray | None:
    """The order in which a tensor's rows are stored under llama.cpp's `name`; None where it is their own."""
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=heads)
    read = processor.process(np.arange(rows), name).weights
    order = np.argsort(read, kind="stable")
    return None if np.array_equal(order, np.arange(rows)) else order
