"""Finds a block's MLP by structure, or refuses it by name, and widens it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from llmtune.adapters.bottleneck_layers import BottleneckConfig
from llmtune.errors import FieldError
from llmtune.model.mlp import mlps
from tests.support import tiny
from tests.support.bottlenecks import adapted, logits, shaken, small


class UpFirst(LlamaMLP):
    """A gated MLP whose layers have each other's names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class FusedUpFirst(Phi3MLP):
    """A gated MLP whose one layer computes the gate last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


@pytest.mark.parametrize(("kind", "form"), [("llama", UpFirst), ("phi3", FusedUpFirst)])
def test_tells_gate_from_up_by_running_them(kind: str, form: type) -> None:
    model = small(kind)
    for block in model.model.layers:
        block.mlp.__class__ = form
    orders = [[layer.parts for layer in mlp.inputs] for mlp in mlps(model)]
    assert orders == [{"llama": [("gate",), ("up",)], "phi3": [("up", "gate")]}[kind]] * 3
    tuned = shaken(adapted(model))
    expected = logits(tuned)
    assert (logits(tuned.merge_and_unload()) - expected).abs().max() <= 1e-5


def test_finding_mlps_changes_no_4bit_weight(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", hidden=64)
    to_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=to_4bit, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    get_peft_model(model.eval(), BottleneckConfig(size=3)).unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_widens_a_merged_model_by_zeros_where_nothing_trained() -> None:
    tuned = shaken(adapted(small("llama"), plan="frozen"))
    delta = {name: p.clone() for name, p in tuned.named_parameters() if "bottleneck_" in name}
    merged = tuned.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert merged.config.intermediate_size == 67
    gates = [block.mlp.gate_proj.weight for block in merged.model.layers]
    assert [tuple(gate.shape) for gate in gates] == [(67, 32)] * 3
    assert not gates[0][64:].any()
    assert torch.equal(gates[1][64:], next(p for n, p in delta.items() if "layers.1.mlp.bottleneck_gate" in n))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("mixtral", {}, r"mlp\.experts \(MixtralExperts\) is no MLP .* try the adapter lora"),
        ("bloom", {}, r"\(BloomBlock\) holds 0 activations"),
        ("bitnet", {"num_key_value_heads": 2}, r"\(BitNetMLP\) is neither down\(act\(gate\(x\)\) \* up\(x\)\) nor"),
        ("llama", {"intermediate_size": 32}, r"32 -> 32, 32 -> 32, 32 -> 32"),
    ],
    ids=["experts", "unknown activation", "a norm inside", "square"],
)
def test_refuses_other_mlps_by_name(kind: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=rf"method\.adapter\.kind: .*{message}"):
        adapted(tiny.model(kind, **more))


def test_refuses_what_could_not_be_merged() -> None:
    model = small("llama")
    model.config.intermediate_size = 65
    with pytest.raises(FieldError, match=r"no key of LlamaConfig says that MLPs are 64 wide.*form: sequential"):
        adapted(model)
    with pytest.raises(ValueError, match="a sequential bottleneck cannot be merged"):
        adapted(model, "sequential").merge_and_unload()
    with pytest.raises(ValueError, match=r"q_proj is no block's MLP"):
        get_peft_model(small("llama"), BottleneckConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="parallel or sequential, not 'paralel'"):
        BottleneckConfig(form="paralel")
    with pytest.raises(ValueError, match="not finite"):
        shaken(adapted(small("llama")), float("nan")).merge_and_unload()
