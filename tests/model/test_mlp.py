"""A block's MLP is found by structure, or refused by name, and made wider."""

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
    """A gated MLP whose one layer gives the gate last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


@pytest.mark.parametrize(("kind", "form"), [("llama", UpFirst), ("phi3", FusedUpFirst)])
def test_what_is_gate_and_what_up_is_read_from_what_runs(kind: str, form: type) -> None:
    model = small(kind)
    for block in model.model.layers:
        block.mlp.__class__ = form
    orders = [[parts for _, parts in mlp.into] for mlp in mlps(model)]
    assert orders == [{"llama": [("gate",), ("up",)], "phi3": [("up", "gate")]}[kind]] * 3
    tuned = shaken(adapted(model))
    expected = logits(tuned)
    assert (logits(tuned.merge_and_unload()) - expected).abs().max() <= 1e-5


def test_finding_mlps_leaves_4bit_weights_as_they_are(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", hidden=64)
    to_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=to_4bit, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    get_peft_model(model.eval(), BottleneckConfig(size=3)).unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_a_merged_model_is_wider_and_zero_where_nothing_trained() -> None:
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
        ("mixtral", {}, r"mlp\.experts \(MixtralExperts\) is no MLP .* the nearest adapter is lora"),
        ("bloom", {}, r"\(BloomBlock\) holds 0 activations"),
        ("bitnet", {"num_key_value_heads": 2}, r"\(BitNetMLP\) is neither down\(act\(gate\(x\)\) \* up\(x\)\) nor"),
        ("llama", {"intermediate_size": 32}, r"32 -> 32, 32 -> 32, 32 -> 32"),
    ],
    ids=["experts", "unknown activation", "a norm inside", "square"],
)
def test_what_has_no_such_mlp_is_refused_by_name(kind: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=rf"method\.adapter\.kind: .*{message}"):
        adapted(tiny.model(kind, **more))


def test_what_could_not_be_merged_is_refused_by_name() -> None:
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
