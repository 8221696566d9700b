"""A base as other tools than llmtune train it: what the bench and the GPU check compare llmtune with."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.arms import Arm
from llmtune.model.blocks import blocks


def load_for(arm: Arm, base: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Load a base with its trained weights in fp32, and with LoRA where the arm has it."""
    if arm.quantize:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True, **options)
    count = len(blocks(model))
    if arm.lora:
        from peft import LoraConfig, get_peft_model

        layers = None if arm.top is None else list(range(count - arm.top, count))
        # PEFT accepts layers_to_transform only together with module names.
        linears = (name for name, module in blocks(model).named_modules() if isinstance(module, torch.nn.Linear))
        names = sorted({name.rsplit(".", 1)[-1] for name in linears})
        torch.manual_seed(0)
        config = LoraConfig(
            r=16, lora_alpha=32, target_modules=names, layers_to_transform=layers, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    elif arm.top is not None:
        model.requires_grad_(False)
        # Only the final norm and the top blocks train: the head is tied to the embedding, which is frozen.
        for part in (*blocks(model)[count - arm.top :], model.base_model.norm):
            part.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
