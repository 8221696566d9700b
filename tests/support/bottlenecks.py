"""Tiny models of many types with bottleneck adapters, for the tests of the adapters and of wider MLPs."""

from typing import Any

import torch

from llmtune.adapters.insert import insert
from llmtune.model.base import model_facts
from tests.support import tiny, training

OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tied": False},
    "llama-biased": {"mlp_bias": True},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {"tied": False},
    "gpt2": {},
    "gpt_neox": {},
    "opt": OPT,
    "phi3": {},
    "modernbert-decoder": {},
}
IDS = torch.arange(3, 43).reshape(2, 20)
FULL = {"kind": "full", "lr": 1e-3}
PLANS = {
    "full": FULL,
    "frozen": {"kind": "frozen", "reach": 2, "lr": 1e-3},
    "gradual": {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 1e-3},
}


def small(kind: str, blocks: int = 3) -> Any:
    """A tiny model in evaluation mode."""
    return tiny.model(kind.removesuffix("-untied").removesuffix("-biased"), blocks=blocks, **KINDS[kind]).eval()


def adapted(model: Any, form: str = "parallel", plan: str = "full", size: int = 3) -> Any:
    """The model with adapters where a plan trains, as `insert` places them."""
    spec = training.spec({**PLANS[plan], "adapter": {"kind": "bottleneck", "form": form, "size": size}})
    return insert(model, spec.method.adapter, spec.method.plan(model_facts(model)), training.BASE).eval()


def shaken(tuned: Any, size: float = 0.1) -> Any:
    """The model with random adapters, biases and all."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "bottleneck_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return tuned


def logits(model: Any) -> torch.Tensor:
    """The model's logits for `IDS`."""
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits.clone()
    return result
