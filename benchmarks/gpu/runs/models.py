"""Models made from configurations, with random weights, and a tokenizer of one token per byte."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.random_weights import write_random

SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300},
    "mid": {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32_000},
    # Llama-3.2-1B's and Llama-3-8B's shapes, whose vocabulary makes the head what it is there.
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": False},
}
NEEDED_GB = {"1b": 38, "mid": 6}
"""Free memory of a card from which a model is trained in full on long rows with every tool."""
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def choose_model(free: int) -> str:
    """The largest model that a card with so many free bytes trains in full: 1b, mid or tiny."""
    return next((name for name, needed in NEEDED_GB.items() if free >= needed * 2**30), "tiny")


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def config(name: str) -> PreTrainedConfig:
    """The configuration of a model by name."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(
        "llama", **{"tie_word_embeddings": True, "max_position_embeddings": 2048, **ids, **SHAPES[name]}
    )


def make_base(folder: Path, name: str, device: str, dtype: torch.dtype) -> Path:
    """Write a base of random weights, drawn on a device, with its tokenizer; a folder that exists is complete."""
    return write_random(folder, config(name), tokenizer(), device, dtype)
