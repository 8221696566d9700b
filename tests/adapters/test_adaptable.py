"""Which linear layers adapters go to in every architecture, and what a plan says of the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmtune import recipe as recipes
from llmtune.adapters.insert import insert
from llmtune.adapters.targets.coverage import coverage, notes_on_adapted, notes_on_rest
from llmtune.adapters.targets.experts import expert_tensors
from llmtune.errors import FieldError
from llmtune.model.base import model_facts
from llmtune.training.prepare import plan_alone
from tests.support import architectures, tiny, training

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
    "granitemoehybrid": {"out_proj": "GraniteMoeHybridMambaLayer reads its weight without calling it"},
    "deepseek_v32": dict.fromkeys(("wq_b", "wk", "weights_proj"), "DeepseekV32Indexer passes no gradient"),
    "jamba": {"dt_proj": "JambaMambaMixer reads its weight without calling it"},
    "zamba2": {
        "out_proj": "Zamba2MambaMixer reads its weight without calling it",
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "0", "1"), "several blocks share its weight"),
        **dict.fromkeys(("gate_up_proj", "down_proj"), "several blocks share its weight"),
    },
}
"""What stays beside the routers of experts, and why."""
ROUTERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32"), ("mlp.gate",)),
    **dict.fromkeys(("glm4_moe", "ernie4_5_moe", "minimax", "minimax_m2"), ("mlp.gate",)),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), ("mlp.gate", "mlp.shared_expert_gate")),
    **dict.fromkeys(("gpt_oss", "phimoe"), ("mlp.router",)),
    **dict.fromkeys(("llama4_text", "jamba"), ("feed_forward.router",)),
    "lfm2_moe": ("feed_forward.gate",),
    "hunyuan_v1_moe": ("mlp.gate.wg",),
    "granitemoehybrid": ("block_sparse_moe.router",),
}


def lora(model: nn.Module, **more: Any) -> nn.Module:
    """The model with LoRA, as a recipe gives it."""
    method = training.spec({"kind": "full", "adapter": {"kind": "lora", "rank": 2, **more}}).method
    return insert(model, method.adapter, method.plan(model_facts(model)), training.BASE)


def backward(model: nn.Module) -> None:
    """Compute the gradients of some function of a few tokens' logits."""
    model(torch.arange(3, 11)[None], use_cache=False).logits.float().pow(2).sum().backward()


@pytest.mark.parametrize("kind", [*architectures.KINDS, *architectures.RECENT])
@pytest.mark.slow
def test_every_adapted_layer_learns(kind: str) -> None:
    model = architectures.model(kind)
    tuned = lora(architectures.model(kind))
    covered = coverage(model, tuned)
    routers = {name.split(".", 3)[-1] for name, why in covered.left.items() if why == "a router"}
    assert routers == set(ROUTERS.get(kind, ()))
    left = {name.rsplit(".", 1)[-1]: why for name, why in covered.left.items() if why != "a router"}
    assert left == LEFT.get(kind, {})
    assert len(covered.adapted) + len(covered.left) == sum(1 for _ in expected(model))
    backward(model)
    weights = {
        name: model.get_parameter(name if name in expert_tensors(model) else f"{name}.weight")
        for name in covered.adapted
    }
    learns = {name: bool(weight.grad is not None and weight.grad.any()) for name, weight in weights.items()}
    backward(tuned)
    gradients = {name: p.grad for name, p in tuned.named_parameters() if ".lora_B." in name}
    assert len(gradients) == len(learns)
    # Some layers start without effect, such as those behind a factor of zero.
    assert sum(g is not None and bool(g.any()) for g in gradients.values()) == sum(learns.values())


def expected(model: nn.Module) -> Iterator[str]:
    """What people would have adapted: every matrix inside the blocks that multiplies hidden states."""
    for name, module in model.named_modules():
        if not any(part.isdigit() for part in name.split(".")):
            continue
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D) or ("Router" in type(module).__name__ and own):
            yield name
        elif type(module).__name__.endswith("Experts"):
            yield from (f"{name}.{leaf}" for leaf, tensor in own.items() if tensor.ndim == 3)


def test_says_what_stays_as_it_is() -> None:
    leaves = "2 x mixer.out_proj (Mamba2Mixer reads its weight without calling it)"
    for kind, notes in (("llama", []), ("mamba2", [f"adapts 2 of 4 linear layers; leaves 2: {leaves}"])):
        model, tuned = architectures.model(kind), lora(architectures.model(kind))
        assert notes_on_rest(model) == []
        assert notes_on_adapted(model, tuned, takes_all=True) == notes
    model, tuned = architectures.model("mixtral"), lora(architectures.model("mixtral"), targets=["q_proj"])
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = experts / sum(p.numel() for p in model.parameters())
    assert share > 0.8
    (note,) = notes_on_adapted(model, tuned, takes_all=False)
    assert note == f"experts, {share:.0%} of the parameters, are not adapted: left as it is by this adapter"


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
