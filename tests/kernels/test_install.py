"""Which patches a training step on CPUs gets, and which it does without where they would do harm."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from llmtune.adapters.insert import insert
from llmtune.kernels.install import install
from llmtune.model.base import model_facts
from tests.support import tiny, training

FULL = {"kind": "full", "lr": 0.01}
LORA = {**FULL, "adapter": {"kind": "lora", "rank": 2}}


def arguments(**changes: int) -> SimpleNamespace:
    """As much of a Trainer's arguments as `install` reads."""
    known = {"bf16": True, "fp16": False, "gradient_checkpointing": False, "world_size": 1}
    return SimpleNamespace(device=torch.device("cpu"), **known | changes)


def patched(method: dict[str, Any], **changes: int) -> tuple[set[str], bool]:
    """The classes of the modules with a patched forward, and whether the embedding's gradient is sparse."""
    model = tiny.model("llama", blocks=2, tied=True)
    recipe = training.spec(method)
    model = insert(model, recipe.method.adapter, recipe.method.plan(model_facts(model)), training.BASE)
    install(model, arguments(**changes))
    names = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    return names, bool(model.get_input_embeddings().sparse)


def test_patches_every_layer_that_can_be() -> None:
    assert patched(FULL) == ({"LlamaRMSNorm", "LlamaMLP", nn.Linear.__name__}, True)
    assert {"LlamaRMSNorm", "LlamaMLP", Linear.__name__} <= patched(LORA)[0]


@pytest.mark.parametrize(
    ("change", "missing"), [({"gradient_checkpointing": True}, "LlamaMLP"), ({"bf16": False}, "Linear")], ids=str
)
def test_leaves_out_what_checkpointing_or_fp32_makes_useless(change: dict[str, bool], missing: str) -> None:
    assert patched(FULL, **change)[0] == patched(FULL)[0] - {missing}


def test_keeps_gradients_dense_among_several_processes() -> None:
    assert not patched(FULL, world_size=2)[1]


@pytest.mark.parametrize("tied", [False, True])
def test_pending_gradients_equal_immediate_ones(tied: bool) -> None:
    results = []
    for world_size in (1, 2):
        model = tiny.model("llama", blocks=2, tied=tied)
        pending = install(model, arguments(world_size=world_size))
        for ids in ([[3, 4, 3, 5]], [[5, 6, 7, 3]]):  # a step of two passes
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.tensor(ids)).logits.float().pow(2).sum().backward()
            assert pending is not None
            pending.flush()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.dtype == torch.float32
        # The head's and the embedding's parts of one matrix are added in another order.
        exact = not (tied and "embed" in name)
        torch.testing.assert_close(gradient, results[1][name], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)
