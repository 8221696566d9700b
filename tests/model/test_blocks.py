"""Distances come from structure, in every architecture, tied or not, with and without an adapter."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from llmtune.adapters.insert import insert
from llmtune.errors import FieldError
from llmtune.model.base import Base, model_facts
from llmtune.model.blocks import blocks, distances
from tests.support import tiny, training

KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "mixtral", "mistral"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_distances_from_the_output(kind: str, tied: bool) -> None:
    model = tiny.model(kind, blocks=3, tied=tied)
    distance = distances(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, block in enumerate(blocks(model)):
        assert {distance[names[id(parameter)]] for parameter in block.parameters()} == {3 - index}
    assert distance[names[id(model.get_input_embeddings().weight)]] == 4
    head = distance[names[id(model.get_output_embeddings().weight)]]
    assert head == (4 if tied else 0)
    assert set(distance.values()) == {0, 1, 2, 3, 4}
    assert set(distance) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("adapter", [{"kind": "lora"}, {"kind": "lora", "dora": True}, {"kind": "ia3"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_gives_adapter_parameters_the_distance_of_their_layer(kind: str, adapter: dict[str, Any]) -> None:
    model = tiny.model(kind, blocks=3)
    recipe = training.spec({"kind": "frozen", "reach": 2, "adapter": adapter})
    adapted = insert(
        model, recipe.method.adapter, recipe.method.plan(model_facts(model)), Base(Path("x"), "x", None, None)
    )
    distance = distances(adapted)
    own = {name: d for name, d in distance.items() if "lora_" in name or "ia3_" in name}
    assert set(own.values()) == {1, 2}
    for index, block in enumerate(blocks(adapted)):
        inside = {id(parameter) for parameter in block.parameters()}
        assert {distance[name] for name, p in adapted.named_parameters() if id(p) in inside} == {3 - index}


def test_refuses_a_model_without_blocks() -> None:
    model = tiny.model(blocks=2)
    model.model.layers = nn.ModuleList(list(model.model.layers) * 2)
    with pytest.raises(FieldError, match="LlamaForCausalLM has no list of 2 layers, so its blocks cannot be told"):
        blocks(model)
