"""Every architecture: its blocks and distances are right, or it is refused by name before any weight is read."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.errors import FieldError
from llmtune.model.base import build_skeleton
from llmtune.model.blocks import blocks, distances
from tests.support import architectures, tiny

BEFORE = {
    "bloom": ["transformer.word_embeddings_layernorm.weight"],
    "gemma4_text": ["model.per_layer_model_projection.weight", "model.per_layer_projection_norm.weight"],
    "gpt2": ["transformer.wpe.weight"],
    "opt": ["model.decoder.project_in.weight", "model.decoder.embed_positions.weight"],
}
"""What computes before the first block beside the embeddings, where architectures have such parameters."""


@pytest.mark.parametrize("kind", [*architectures.KINDS, *architectures.RECENT])
def test_distances_follow_what_computes_before_and_after_the_blocks(kind: str, tmp_path: Path) -> None:
    config = tiny.config(kind, tied=False, **architectures.settings(kind))
    model = build_skeleton(architectures.config_folder(tmp_path, config))
    listed, distance = blocks(model), distances(model)
    assert set(distance) == set(dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = [{distance[names[id(p)]] for p in block.parameters()} for block in listed]
    assert [max(one) for one in own] == list(range(len(listed), 0, -1))
    shared = kind == "zamba2"  # some of its blocks share an attention layer, which counts with the farthest of them
    assert shared or all(len(one) == 1 for one in own)
    embedding = model.get_input_embeddings().weight
    before = [distance[name] for name in (names[id(embedding)], *BEFORE.get(kind, []))]
    assert set(before) == {len(listed) + 1}
    outside = set(distance) - {names[id(p)] for p in listed.parameters()}
    after = [name for name in outside if distance[name] == 0]
    assert len(after) + sum(distance[name] == len(listed) + 1 for name in outside) == len(outside)
    assert any("norm" in name or "ln" in name for name in after)
    head = model.get_output_embeddings().weight
    assert head is embedding or distance[names[id(head)]] == 0


def test_blocks_that_share_a_layer_train_it_with_the_farthest_of_them() -> None:
    model = architectures.model("zamba2")
    shared = [name for name in distances(model) if "shared_transformer" in name]
    assert shared
    assert {distances(model)[name] for name in shared} == {3}


def test_a_vision_tower_has_no_distance() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.vision_config())
    assert blocks(model) is model.model.language_model.layers
    beyond = set(dict(model.named_parameters())) - set(distances(model))
    assert {name.split(".")[1] for name in beyond} == {"vision_tower", "multi_modal_projector"}
    assert set(distances(model).values()) == {0, 1, 2, 3}


def test_distances_leave_weights_mode_and_random_numbers_alone() -> None:
    model = architectures.model("gpt2", embd_pdrop=0.5).train()
    state = torch.get_rng_state()
    distances(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "stored", "settings", "message"),
    [
        ("t5", "T5ForConditionalGeneration", {}, "is an encoder-decoder model"),
        ("bart", "BartForConditionalGeneration", {}, "is an encoder-decoder model"),
        ("bert", "BertForMaskedLM", {}, "stores a BertForMaskedLM, no causal language model"),
        ("bert", "BertLMHeadModel", {}, "whose tokens see those after them"),
        ("llama", "LlamaForSequenceClassification", {}, "stores a LlamaForSequenceClassification"),
        ("llama", "LlamaModel", {}, "stores a LlamaModel, no causal language model"),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", {}, "no causal language model"),
        ("qwen2_5_vl", "Qwen2_5_VLModel", {}, "is that of a Qwen2_5_VLForConditionalGeneration"),
        ("mllama", "MllamaForConditionalGeneration", {}, "text does not pass its cross-attention layers"),
        ("cohere2_vision", "Cohere2VisionForConditionalGeneration", {}, "computes its logits without their scale"),
        ("paligemma", "PaliGemmaForConditionalGeneration", {}, "tokens of its prompts see those after them"),
        ("fuyu", "FuyuForCausalLM", {}, "not proved for this type"),
        ("whisper", "WhisperForConditionalGeneration", {}, "is an encoder-decoder model"),
        ("siglip", "SiglipModel", {}, "is a SiglipModel, no causal language model"),
        ("qwen3_5", "Qwen3_5ForCausalLM", {}, "is that of a Qwen3_5ForConditionalGeneration"),
        ("xlm", "XLMWithLMHeadModel", {"n_layers": 2, "emb_dim": 32, "n_heads": 4}, "has 4 lists of 2 layers"),
    ],
)
def test_refuses_what_cannot_be_trained_whole_by_name(
    kind: str, stored: str, settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    base = architectures.config_folder(tmp_path, AutoConfig.for_model(kind, **settings), stored)
    with pytest.raises(FieldError) as caught:
        build_skeleton(base)
    assert caught.value.key == "model.base"
    assert message in str(caught.value)
    assert stored.removesuffix("WithLMHeadModel") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("stored", ["LlamaForCausalLM", "LLaMAForCausalLM", None])
def test_takes_a_causal_language_model_under_another_or_no_name(stored: str | None, tmp_path: Path) -> None:
    skeleton = build_skeleton(architectures.config_folder(tmp_path, tiny.config(), stored))
    assert type(skeleton).__name__ == "LlamaForCausalLM"
