"""Models with random weights, as a base is stored: the bench and the GPU check train them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llmtune.files import write_folder


def write_random(folder: Path, config: PreTrainedConfig, tokenizer: Any, device: str, dtype: torch.dtype) -> Path:
    """Write a base whose weights are drawn on a device with seed 0; a folder that exists is complete."""
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = config.eos_token_id
    with write_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder
