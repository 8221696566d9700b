"""How many rows a batch without gradients may have on a GPU, by what is free there."""

from transformers import PreTrainedModel

from llmtune.machine.device import free_bytes

_MOST_ROWS = 512
_ACTIVATIONS = (8, 3)
"""Tensors that a block holds at once, at the most: as wide as the hidden state, and as the MLP."""


def free_for_batches(model: PreTrainedModel) -> int | None:
    """Return half of the bytes that are free on a model's GPU; None on a CPU, whose batches are of fixed sizes."""
    return None if model.device.type == "cpu" else free_bytes(model.device) // 2


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of the keys and values of so many tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(tokens * 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def row_bytes(model: PreTrainedModel, tokens: int, shared: int = 0, scored: int = 1) -> int:
    """Return the bytes that a row of tokens takes in a forward pass, after `shared` tokens whose cache it copies.

    They are its keys and values, the activations of one block, its mask, and fp32 logits of `scored` tokens.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    hidden = int(config.hidden_size)
    mlp = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    activations = tokens * itemsize * (_ACTIVATIONS[0] * hidden + _ACTIVATIONS[1] * mlp)
    logits = scored * int(config.vocab_size) * (itemsize + 8)
    return cache_bytes(model, shared + tokens) + activations + tokens * (shared + tokens) + logits


def fitting_rows(free: int, bytes_per_row: int) -> int:
    """Return how many rows fit into free memory: a power of two, so that a little more or less changes nothing."""
    rows = max(1, min(_MOST_ROWS, free // bytes_per_row))
    return 1 << (rows.bit_length() - 1)
