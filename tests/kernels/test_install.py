"""What is installed for a step on CPUs, and what is left out where it would do harm."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from llmtune.adapters.insert import insert
from llmtune.kernels.cpu.autocast import PendingGradients
from llmtune.kernels.cpu.install import install
from llmtune.model.base import model_facts
from tests.support import tiny, training

LORA = {"kind": "full", "lr": 0.01, "adapter": {"kind": "lora", "rank": 2}}


def installed(method: dict[str, Any], **options: int) -> tuple[set[str], bool]:
    """The classes of the modules that compute in another way, and whether the embedding's gradient is sparse."""
    model = tiny.model("llama", blocks=2, tied=True)
    recipe = training.spec(method)
    model = insert(model, recipe.method.adapter, recipe.method.plan(model_facts(model)), training.BASE)
    install(model, SimpleNamespace(**{"bf16": True, "gradient_checkpointing": False, "world_size": 1, **options}))
    changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    return changed, bool(model.get_input_embeddings().sparse)


def test_every_part_is_installed_where_it_applies() -> None:
    assert installed({"kind": "full", "lr": 0.01}) == ({"LlamaRMSNorm", "LlamaMLP", nn.Linear.__name__}, True)
    assert {"LlamaRMSNorm", "LlamaMLP", Linear.__name__} <= installed(LORA)[0]


@pytest.mark.parametrize(
    ("how", "missing"), [({"gradient_checkpointing": True}, "LlamaMLP"), ({"bf16": False}, "Linear")], ids=str
)
def test_what_checkpointing_or_fp32_make_useless_is_left_out(how: dict[str, bool], missing: str) -> None:
    every = installed({"kind": "full", "lr": 0.01})[0]
    assert installed({"kind": "full", "lr": 0.01}, **how)[0] == every - {missing}


def test_among_several_processes_gradients_stay_dense() -> None:
    assert not installed({"kind": "full", "lr": 0.01}, world_size=2)[1]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_are_held_until_a_pass_is_over_are_the_same(tied: bool) -> None:
    given = []
    for world_size in (1, 2):
        model = tiny.model("llama", blocks=2, tied=tied)
        held = install(model, SimpleNamespace(bf16=True, gradient_checkpointing=False, world_size=world_size))
        for ids in ([[3, 4, 3, 5]], [[5, 6, 7, 3]]):  # a step of two passes
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.tensor(ids)).logits.float().pow(2).sum().backward()
            held.give()
        given.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in given[0].items():
        assert gradient.dtype == torch.float32
        # The head's and the embedding's parts of one matrix are added in another order.
        exact = not (tied and "embed" in name)
        torch.testing.assert_close(gradient, given[1][name], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)


def test_nothing_is_held_once_it_was_given() -> None:
    held, weight = PendingGradients(), torch.zeros(2, 2)
    held.add(weight, torch.ones(2, 2).bfloat16())
    held.give()
    held.give()
    assert torch.equal(weight.grad, torch.ones(2, 2))
