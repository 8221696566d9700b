"""Experts that a model keeps as one tensor: LoRA adapts them, PEFT alone loads them, the merge adds them exactly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune import recipe as recipes
from llmtune.adapters.insert import adapted_names, count_adapted, insert
from llmtune.adapters.targets.coverage import coverage
from llmtune.errors import FieldError, RecipeError
from llmtune.estimate.activations import as_trained, trace
from llmtune.files import read_json
from llmtune.kernels.lora import patch_lora
from llmtune.merging.step import merge
from llmtune.model.base import model_facts
from llmtune.model.quantize import split_linear_layers
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import plan_alone, prepare
from tests.support import architectures, runs, tiny, training

IDS = torch.arange(3, 40)[None]


def save_base(folder: Path, kind: str = "qwen3_moe") -> Path:
    """Write a base with experts."""
    return tiny.save_base(folder / "base", kind, **architectures.settings(kind))


def adapted(model: Any, method: dict[str, Any] | None = None, **more: Any) -> Any:
    """A model with LoRA, as a recipe gives it."""
    settings = training.spec({**(method or {"kind": "full"}), "adapter": {"kind": "lora", "rank": 2, **more}}).method
    return insert(model, settings.adapter, settings.plan(model_facts(model)), training.BASE)


def plan(folder: Path, adapter: dict[str, Any], **method: Any) -> Any:
    """The plan table of a recipe on a base with experts."""
    base = folder / "base" if (folder / "base").exists() else save_base(folder)
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(8))
    method = {"kind": "full", "lr": 0.01, "adapter": adapter, **method}
    return plan_alone(recipes.load(tiny.write_recipe(folder / "recipe.yaml", base, rows, method)), gpus=0)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_merges_adapted_experts_exactly(tmp_path: Path, quick: None, kind: str) -> None:
    method = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 2}}
    run = runs.trained(tmp_path, method, base=save_base(tmp_path, kind), merge={"dtype": "float32"})
    facts = merge(run)
    assert facts["gap"] <= facts["bound"] == 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", run.merged))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    experts = {name for name in before if ".experts." in name and "bias" not in name}
    assert experts
    assert experts <= changed
    assert not any("gate.weight" in name or "router" in name for name in changed)
    logits = AutoModelForCausalLM.from_pretrained(run.merged, local_files_only=True).eval()(IDS).logits
    torch.testing.assert_close(logits, runs.load_tuned(run)(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_resumed_run_with_adapted_experts_ends_bit_equal(tmp_path: Path) -> None:
    save_base(tmp_path)
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    method = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01, "adapter": {"kind": "lora", "rank": 2}}
    every = {"train": {"epochs": 1, "batch_size": 4, "save_every": 0.2, "keep": 99}}
    file = tiny.write_recipe(tmp_path / "run.yaml", tmp_path / "base", rows, method, **every)
    run = prepare(recipes.load(file), tmp_path / "run", gpus=0)
    train(run)
    whole = load_file(run.delta / "adapter_model.safetensors")
    for folder in [run.delta, *complete_checkpoints(run.checkpoints)[2:]]:
        shutil.rmtree(folder)
    run.forget("train")
    train(run)
    resumed = load_file(run.delta / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    moved = [name for name in whole if ".experts." in name and "lora_B" in name and whole[name].any()]
    assert len(moved) == 4
    assert 4 * sum(tensor.numel() for tensor in whole.values()) == read_json(run.plan_file)["delta_bytes"]


def test_plan_counts_experts_and_says_what_it_leaves(tmp_path: Path) -> None:
    table = plan(tmp_path, {"kind": "lora", "rank": 2})
    each = {name: 2 for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert table.adapted == {**each, "experts.down_proj": 2, "experts.gate_up_proj": 2}
    experts = 2 * (32 + 32 + 16 + 32) * 4 * 2
    attention = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32)) * 2
    assert table.trained == experts + attention
    assert table.notes[-1] == "adapts 12 of 14 linear layers; leaves 2: 2 x mlp.gate (a router)"
    reached = plan(tmp_path, {"kind": "lora", "rank": 2}, kind="frozen", reach=1)
    assert reached.trained == table.trained // 2
    assert reached.notes[-1] == "adapts 6 of 7 linear layers; leaves 1: 1 x mlp.gate (a router)"
    left = plan(tmp_path, {"kind": "lora", "rank": 2, "experts": False})
    assert left.trained == attention
    assert left.notes[-2] == (
        "adapts 8 of 14 linear layers; leaves 6: 2 x mlp.experts.down_proj (left as it is by this adapter), "
        "2 x mlp.experts.gate_up_proj (left as it is by this adapter), 2 x mlp.gate (a router)"
    )
    assert left.notes[-1] == "experts, 45% of the parameters, are not adapted: left as it is by this adapter"


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"dora": True}, "dora: DoRA has magnitudes for layers, and this model keeps its experts as one tensor"),
        ({"dropout": 0.1}, "dropout: dropout acts on the input of a layer, and this model keeps its experts"),
        ({"init": "pissa"}, "init: pissa is made for layers"),
        ({"init": "orthogonal"}, "init: orthogonal is made for layers"),
        ({"experts": False, "targets": ["gate_up_proj"]}, "experts: false leaves nothing to adapt"),
        ({"targets": ["gate_proj"]}, "'gate_proj' matches no linear layer that trains; did you mean 'gate_up_proj'"),
        ({"targets": ["gate"]}, "'gate' is a Qwen3MoeTopKRouter"),
        ({"kind": "vera", "targets": ["gate_up_proj"]}, "one tensor for all experts, which the adapter lora alone"),
        ({"kind": "ia3", "targets": ["gate_up_proj"]}, "one tensor for all experts, which the adapter lora alone"),
    ],
)
def test_refuses_what_cannot_adapt_experts_in_one_line(tmp_path: Path, adapter: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(tmp_path, {"kind": "lora", **({} if "kind" in adapter else {"rank": 2}), **adapter})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    if adapter.keys() & {"dora", "dropout"} or "init" in adapter:
        assert "experts: false leaves them" in str(caught.value)
        assert plan(tmp_path, {"kind": "lora", "rank": 2, "experts": False, **adapter}).adapted


def test_patterns_reach_experts_and_layers_that_peft_takes_for_them() -> None:
    tuned = adapted(architectures.model("deepseek_v3"), ranks={"experts.gate_up_proj": 1, "down_proj": 3}, alpha=6)
    layers = dict(zip(adapted_names(tuned), (m for m in tuned.modules() if isinstance(m, LoraLayer)), strict=True))
    for name, layer in layers.items():
        rank = 1 if name.endswith("experts.gate_up_proj") else 3 if name.endswith("down_proj") else 2
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 6 / rank), name
    assert count_adapted(tuned)["down_proj"] == 2  # of the first block's MLP, and of the shared expert


def test_faster_layers_leave_tensors_to_peft() -> None:
    tuned = adapted(architectures.model("qwen3_moe"))
    tensors = [module for module in tuned.modules() if isinstance(module, ParamWrapper)]
    assert patch_lora(tuned) == sum(isinstance(module, LoraLayer) for module in tuned.modules()) - len(tensors)
    assert len(tensors) == 4
    assert not any("forward" in vars(module) for module in tensors)


def test_estimate_counts_the_sums_of_experts_once_whatever_the_tokens() -> None:
    with torch.device("meta"):
        tuned = adapted(architectures.model("deepseek_v3"))
    names = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    few, more = (trace(as_trained(tuned, names, names, torch.float32), n, torch.float32, "cuda") for n in (31, 63))
    tensors = {module.get_param() for module in tuned.modules() if isinstance(module, ParamWrapper)}
    assert not few.rough
    assert few.folded == more.folded
    assert sum(few.folded) == 4 * sum(tensor.numel() for tensor in tensors)
    assert few.plain / 31 == more.plain / 63


def test_4bit_keeps_the_layers_that_are_adapted_as_tensors() -> None:
    model = architectures.model("deepseek_v3")
    frozen, kept = split_linear_layers(model, training.spec({"kind": "full"}).method.plan(model_facts(model)), True)
    tuned = adapted(architectures.model("deepseek_v3"))
    wrapped = {name for name, module in tuned.get_base_model().named_modules() if isinstance(module, ParamWrapper)}
    dense = {name for name in wrapped if "experts" not in name.split(".")}
    assert len(dense) == 6
    assert dense <= set(kept)
    assert not dense & set(frozen)


def test_vera_leaves_experts_and_says_so() -> None:
    model = architectures.model("qwen3_moe")
    settings = training.spec({"kind": "full", "adapter": {"kind": "vera", "rank": 4}}).method
    tuned = insert(architectures.model("qwen3_moe"), settings.adapter, settings.plan(model_facts(model)), training.BASE)
    words = coverage(model, tuned).words
    assert words.startswith("adapts 8 of 14 linear layers; leaves 6: ")
    assert "2 x mlp.experts.down_proj (left as it is by this adapter)" in words


def test_named_targets_take_experts_and_layers_of_that_name() -> None:
    tuned = adapted(architectures.model("deepseek_v3"), targets=["down_proj"])
    assert count_adapted(tuned) == {"down_proj": 2, "experts.down_proj": 1}
    with pytest.raises(FieldError, match="'gate' is a DeepseekV3TopkRouter"):
        adapted(architectures.model("deepseek_v3"), targets=["gate"])
