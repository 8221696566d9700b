"""Which linear layers adapters go to in every architecture, and what a plan says of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmtune import recipe as recipes
from llmtune.adapters.adaptable import linear_layers, notes_on_rest
from llmtune.adapters.insert import count_adapted, insert
from llmtune.errors import FieldError
from llmtune.model.base import model_facts
from llmtune.training.prepare import plan_alone
from tests.support import architectures, tiny, training

MLP = ("down_proj", "gate_proj", "up_proj")
LEFT: dict[str, dict[str, str]] = {
    "mamba": {
        "dt_proj": "MambaMixer reads its weight without calling it",
        "out_proj": "MambaMixer reads its weight without calling it",
        "x_proj": "MambaMixer reads its weight without calling it",
    },
    "mamba2": {"out_proj": "Mamba2Mixer reads its weight without calling it"},
    "bamba": {"out_proj": "BambaMixer reads its weight without calling it"},
    "falcon_h1": {"out_proj": "FalconH1Mixer reads its weight without calling it"},
    "nemotron_h": {"out_proj": "NemotronHMamba2Mixer reads its weight without calling it"},
    "jamba": {"dt_proj": "JambaMambaMixer reads its weight without calling it"},
    "zamba2": {
        "out_proj": "Zamba2MambaMixer reads its weight without calling it",
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "0", "1"), "several blocks share its weight"),
        **dict.fromkeys(("gate_up_proj", "down_proj"), "several blocks share its weight"),
    },
    "deepseek_v3": dict.fromkeys(MLP, "PEFT takes its name for the weights of experts"),
    "qwen3_next": dict.fromkeys(MLP, "PEFT takes its name for the weights of experts"),
    "llama4_text": {"router": "a Llama4Router returns more than a linear layer does"},
    "phimoe": {"router": "a PhimoeTopKRouter returns more than a linear layer does"},
}


def lora(model: nn.Module, **more: Any) -> nn.Module:
    """The model with LoRA, as a recipe gives it."""
    method = training.spec({"kind": "full", "adapter": {"kind": "lora", "rank": 2, **more}}).method
    return insert(model, method.adapter, method.plan(model_facts(model)), training.BASE)


def backward(model: nn.Module) -> None:
    """Compute the gradients of some function of a few tokens' logits."""
    model(torch.arange(3, 11)[None], use_cache=False).logits.float().pow(2).sum().backward()


@pytest.mark.parametrize("kind", architectures.KINDS)
def test_every_adapted_layer_learns(kind: str) -> None:
    model = architectures.model(kind)
    layers = linear_layers(model)
    left = {name.rsplit(".", 1)[-1]: why for name, why in layers.items() if why}
    assert left == LEFT.get(kind, {})
    backward(model)
    learns = {name: bool(model.get_submodule(name).weight.grad.any()) for name, why in layers.items() if why is None}
    tuned = lora(model)
    assert sum(count_adapted(tuned).values()) == len(learns)
    backward(tuned)
    gradients = {name: p.grad for name, p in tuned.named_parameters() if ".lora_B." in name}
    names = {name.split(".lora_B.")[0].removeprefix("base_model.model."): g for name, g in gradients.items()}
    # Some layers start without effect, such as those behind a factor of zero.
    assert {name: g is not None and bool(g.any()) for name, g in names.items()} == learns


def test_says_what_stays_as_it_is() -> None:
    assert notes_on_rest(architectures.model("llama"), adapted=True) == []
    assert notes_on_rest(architectures.model("mamba2"), adapted=False) == []
    notes = notes_on_rest(architectures.model("mamba2"), adapted=True)
    assert notes == ["out_proj is not adapted: Mamba2Mixer reads its weight without calling it"]
    model = architectures.model("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = experts / sum(p.numel() for p in model.parameters())
    assert share > 0.8
    (note,) = notes_on_rest(model, adapted=True)
    assert note == f"experts, {share:.0%} of the parameters, are not adapted: they are no linear layers"


def test_says_that_a_vision_tower_stays_as_it_is(tmp_path: Path) -> None:
    base = architectures.save_vision_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    for adapter in ("none", {"kind": "lora", "rank": 2}):
        method = {"kind": "full", "lr": 0.01, "adapter": adapter}
        table = plan_alone(recipes.load(tiny.write_recipe(tmp_path / "recipe.yaml", base, rows, method)), gpus=0)
        tower = [note for note in table.notes if note.startswith("vision_tower, multi_modal_projector, ")]
        assert len(tower) == 1
        assert tower[0].endswith("% of the parameters, stay as they are: text does not pass them")
        assert table.blocks == 2


def test_refuses_named_layers_that_cannot_be_adapted() -> None:
    with pytest.raises(FieldError, match="'out_proj' cannot be adapted: Mamba2Mixer reads its weight"):
        lora(architectures.model("mamba2"), targets=["out_proj"])


def test_refuses_a_model_without_a_layer_to_adapt() -> None:
    model = architectures.model("mamba2")
    for block in model.backbone.layers:
        block.mixer.in_proj = nn.Identity()
    message = r"no linear layer can be adapted: out_proj \(Mamba2Mixer reads its weight without calling it\)"
    with pytest.raises(FieldError, match=message):
        lora(model)
    for block in model.backbone.layers:
        block.mixer.out_proj = nn.Identity()
    with pytest.raises(FieldError, match="the blocks have no linear layer but Conv1d, Mamba2Mixer, Mamba2RMSNorm"):
        lora(model)


def test_a_class_that_peft_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("Module 'q_proj' is incompatible\nmore")

    monkeypatch.setattr("llmtune.adapters.insert.get_peft_model", refuse)
    with pytest.raises(FieldError, match=r"^method.adapter: PEFT refuses this model: Module 'q_proj' is incompatible$"):
        lora(architectures.model("llama"))
