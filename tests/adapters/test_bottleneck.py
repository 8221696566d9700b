"""Bottleneck adapters start as the base, train alone, load through PEFT, and merge into a wider stock model."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune import recipe
from llmtune.adapters.bottleneck_layers import BottleneckConfig, BottleneckLayer
from llmtune.adapters.delta import load_delta, save_delta
from llmtune.errors import ProofError, RecipeError
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.model.blocks import distances
from llmtune.run import locates_mistakes
from llmtune.training.plan_table import build_layout, plan_table
from tests.support import runs, tiny, training
from tests.support.bottlenecks import FULL, IDS, KINDS, PLANS, adapted, logits, shaken, small
from tests.support.gpu_ways import Calls


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_start_equals_the_base_bit_for_bit(kind: str, form: str) -> None:
    base = logits(small(kind))
    tuned = adapted(small(kind), form)
    assert torch.equal(logits(tuned), base)
    assert tuned.training is False
    own = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert own
    assert all("bottleneck_" in name and p.dtype == torch.float32 for name, p in own.items())
    moved = logits(shaken(tuned))
    assert (moved - base).abs().max() > (1e-2 if form == "parallel" else 1e-6)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    assert torch.equal(logits(copy.deepcopy(tuned)), moved)


@pytest.mark.parametrize("bits", [32, 4])
def test_new_neurons_have_the_spread_of_the_mlp(tmp_path: Path, bits: int) -> None:
    base = tiny.save_base(tmp_path / "base", hidden=64, initializer_range=0.3)
    model = load_model(Base(base, "base", None, None), keep=["lm_head"] if bits == 4 else None)
    tuned = adapted(model, size=40)
    for part in ("gate", "up"):
        weights = torch.cat([p.flatten() for name, p in tuned.named_parameters() if f"bottleneck_{part}" in name])
        assert 0.27 < weights.std() < 0.33


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_adapter_matches_its_formula(form: str) -> None:
    tuned = shaken(adapted(small("llama"), form))
    layer = next(module for module in tuned.modules() if isinstance(module, BottleneckLayer))
    part = {name: linear.weight for name, linear in layer.parts("default").items()}
    x = torch.randn(5, 32)
    y = layer.base_layer(x)
    expected = {
        "parallel": lambda: nn.functional.silu(x @ part["gate"].T) * (x @ part["up"].T),
        "sequential": lambda: nn.functional.silu(y @ part["up"].T),
    }[form]()
    torch.testing.assert_close(layer(x), y + expected @ part["down"].T)


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_bf16_input_goes_straight_to_autocast_with_the_same_bits(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[list[torch.Tensor], int]:
        model = shaken(adapted(small("llama").bfloat16(), form)).train()
        with Calls() as calls:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(input_ids=IDS).logits
            out.float().pow(2).sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], len(calls.names)

    branch = BottleneckLayer._branch
    ours, count = step()
    monkeypatch.setattr(BottleneckLayer, "_branch", lambda layer, name, x: branch(layer, name, x.float()))
    through_fp32, more = step()
    assert len(ours) > 1
    for mine, other in zip(ours, through_fp32, strict=True):
        assert torch.equal(mine, other)
    assert count < more


@pytest.mark.parametrize(
    ("kind", "plan", "form"),
    [
        *(("llama", plan, "parallel") for plan in PLANS),
        ("llama", "gradual", "sequential"),
        ("opt", "gradual", "parallel"),
        ("opt", "frozen", "sequential"),
    ],
)
def test_only_planned_adapters_move(tmp_path: Path, kind: str, plan: str, form: str) -> None:
    watch = training.Watch()
    method = {**PLANS[plan], "adapter": {"kind": "bottleneck", "form": form}}
    more: dict[str, Any] = {"model": small(kind, 4), "gradient_checkpointing": True, "weight_decay": 0.1}
    trainer = training.trainer(tmp_path, method, callbacks=[watch], steps=6, **more)
    trainer.train()
    reaches = {"full": [4] * 6, "frozen": [2] * 6, "gradual": [1, 1, 2, 2, 4, 4]}[plan]
    end = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    far = {name: 4 - int(name.split("layers.")[1].split(".")[0]) for name in end if "bottleneck_" in name}
    for step, (before, after) in enumerate(zip(watch.before, [*watch.before[1:], end], strict=True)):
        moved = {name for name in end if not torch.equal(before[name], after[name])}
        planned = {name for name in far if far[name] <= reaches[step]}
        # The layer down starts at 0, so a bias before it, which does not decay, has no gradient at its first step.
        first = {name for name in planned if step == 0 or far[name] > reaches[step - 1]}
        late = {name for name in first if name.endswith("bias") and "down" not in name}
        assert planned - late <= moved <= planned, f"step {step + 1}"
    blocks = {name.split(".bottleneck_")[0] for name in end if "bottleneck_" in name}
    assert len(blocks) == max(reaches)


CASES = [(kind, "parallel", "frozen") for kind in KINDS]
CASES += [("llama", "parallel", "full"), ("llama", "sequential", "full"), ("opt", "sequential", "frozen")]
ELSEWHERE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folders, ids = json.load(sys.stdin)
def stock(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    return model.eval()
def logits(model):
    with torch.inference_mode():
        return model(torch.tensor(ids)).logits
results = {f"{name}/merged": logits(stock(f"{name}/merged")) for name, form in folders if form == "parallel"}
assert not {"peft", "llmtune"} & set(sys.modules)
from peft import PeftModel
import llmtune.bottleneck
for name, _ in folders:
    results[f"{name}/delta"] = logits(PeftModel.from_pretrained(stock(f"{name}/base"), f"{name}/delta").eval())
save_file(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every case: live here, and of delta and merged folder in one fresh process."""
    root = tmp_path_factory.mktemp("cases")
    live, folders = {}, []
    for case in CASES:
        folder = root / "-".join(case)
        kind, form, plan = case
        small(kind).save_pretrained(folder / "base")
        tuned = shaken(adapted(small(kind), form, plan))
        live[f"{folder.name}/live"] = logits(tuned)
        save_delta(
            tuned,
            dict(tuned.named_parameters()),
            folder / "delta",
            Base(folder / "base", "tiny", None, None),
            "bottleneck",
        )
        if form == "parallel":
            tuned.merge_and_unload().save_pretrained(folder / "merged")
        folders.append((str(folder), form))
    out = root / "logits.safetensors"
    cases = json.dumps([folders, IDS.tolist()])
    subprocess.run([sys.executable, "-c", ELSEWHERE, out], input=cases, text=True, check=True)
    return live | {key.removeprefix(f"{root}/"): tensor for key, tensor in load_file(out).items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_fresh_process_loads_delta_and_merged_folder(elsewhere: dict[str, torch.Tensor], case: Any) -> None:
    name = "-".join(case)
    assert torch.equal(elsewhere[f"{name}/delta"], elsewhere[f"{name}/live"])
    if case[1] == "parallel":
        assert (elsewhere[f"{name}/merged"] - elsewhere[f"{name}/live"]).abs().max() <= 1e-5


def test_run_with_parallel_adapter_merges(tmp_path: Path, quick: None) -> None:
    method = {"kind": "frozen", "reach": 1, "lr": 1e-3, "adapter": {"kind": "bottleneck"}}
    run = runs.trained(tmp_path, method, merge={"dtype": "float32"})
    proof = merge(run)
    assert proof["gap"] <= 1e-5 < 1e-3 < proof["shift"]
    base, merged = read_json(tmp_path / "base" / "config.json"), read_json(run.merged / "config.json")
    assert {key: merged[key] for key in base if merged[key] != base[key]} == {"intermediate_size": 64 + 32 // 16}


def test_refuses_to_merge_sequential_adapter_before_and_after_training(tmp_path: Path) -> None:
    method = {**FULL, "adapter": {"kind": "bottleneck", "form": "sequential"}}
    run = runs.trained(tmp_path, method, merge={"enabled": False})
    with pytest.raises(
        ProofError, match=r"sequential bottleneck cannot be merged: train with form: parallel, .* publish the delta"
    ):
        merge(run)
    assert not run.merged.exists()
    file = tiny.write_recipe(tmp_path / "again.json", tmp_path / "base", tmp_path / "rows.jsonl", method)
    settings, base = recipe.load(file), Base(tmp_path / "base", "base", None, None)
    with pytest.raises(
        RecipeError,
        match=r"again\.json:\d+: method\.adapter\.form: a sequential .* form: parallel, .* merge\.enabled: false",
    ):
        locates_mistakes(plan_table)(settings, base, build_layout(settings, base, build_skeleton(base)), 40, 1)


@pytest.mark.slow
def test_load_delta_registers_the_method_in_a_fresh_process(tmp_path: Path) -> None:
    small("llama").save_pretrained(tmp_path / "base")
    tuned = shaken(adapted(small("llama")))
    base = Base(tmp_path / "base", "tiny", None, None)
    save_delta(tuned, dict(tuned.named_parameters()), tmp_path / "delta", base, "bottleneck")
    script = (
        "import sys\nfrom pathlib import Path\nfrom transformers import AutoModelForCausalLM\n"
        "from llmtune.adapters.delta import load_delta\n"
        "load_delta(AutoModelForCausalLM.from_pretrained(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "delta")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_skeleton_matches_the_tensors_of_the_model(tmp_path: Path, form: str) -> None:
    base = Base(tiny.save_base(tmp_path / "base", "phi3"), "base", None, None)
    counts = [
        {name: (tuple(p.shape), p.requires_grad) for name, p in adapted(model, form).named_parameters()}
        for model in (build_skeleton(base), load_model(base))
    ]
    assert counts[0] == counts[1]


def test_adapters_have_the_distance_of_their_block() -> None:
    tuned = adapted(small("opt"), plan="frozen")
    near = {name: distance for name, distance in distances(tuned).items() if "bottleneck_" in name}
    assert sorted(set(near.values())) == [1, 2]
    assert all(f".layers.{3 - distance}." in name for name, distance in near.items())


@pytest.mark.parametrize("harm", ["missing", "unexpected", "renamed", "shape"])
def test_refuses_delta_that_does_not_fit(tmp_path: Path, harm: str) -> None:
    small("llama").save_pretrained(tmp_path / "base")
    base, delta = Base(tmp_path / "base", "tiny", None, None), tmp_path / "delta"
    tuned = shaken(adapted(small("llama")))
    save_delta(tuned, dict(tuned.named_parameters()), delta, base, "bottleneck")
    load_delta(small("llama"), delta)
    stored = load_file(delta / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.bottleneck_up.weight"
    tensor = stored[name].clone() if harm == "unexpected" else stored.pop(name)
    if harm != "missing":
        stored[name if harm == "shape" else name.replace("_up", "_upper")] = tensor[:2] if harm == "shape" else tensor
    save_file(stored, delta / "adapter_model.safetensors")
    with pytest.raises(ProofError, match=r"bottleneck_up"):
        load_delta(small("llama"), delta)


def test_adapters_can_be_switched_and_taken_off() -> None:
    model = small("opt")
    base = logits(model)
    tuned = shaken(adapted(model, size=2))
    first = logits(tuned)
    tuned.add_adapter("other", BottleneckConfig(form="sequential", size=5))
    assert torch.equal(logits(tuned), first)
    tuned.set_adapter("other")
    assert torch.equal(logits(tuned), base)
    assert all(".other." in name for name, p in tuned.named_parameters() if p.requires_grad)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    plain = tuned.unload()
    assert torch.equal(logits(plain), base)
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_trains_on_4bit_base_and_merges_into_the_original(tmp_path: Path) -> None:
    base = Base(tiny.save_base(tmp_path / "base", hidden=64), "base", None, None)
    model = load_model(base, keep=["lm_head"])
    before = logits(model)
    tuned = adapted(model)
    assert torch.equal(logits(tuned), before)
    trainer = training.trainer(tmp_path, {**FULL, "lr": 0.01, "adapter": {"kind": "bottleneck"}}, model=tuned.unload())
    trainer.train()
    assert not torch.equal(logits(trainer.model.eval()), before)
    save_delta(trainer.model, dict(trainer.model.named_parameters()), tmp_path / "delta", base, "bottleneck")
    with pytest.raises(ValueError, match="16- or 32-bit base only"):
        trainer.model.merge_and_unload()
    live = load_delta(load_model(base), tmp_path / "delta")
    expected = logits(live)
    assert (logits(live.merge_and_unload()) - expected).abs().max() <= 1e-5


def test_evaluation_of_4bit_model_leaves_gradients_unchanged(tmp_path: Path) -> None:
    base = Base(tiny.save_base(tmp_path / "base", hidden=64), "base", None, None)
    tuned = shaken(adapted(load_model(base, keep=["lm_head"])))
    gradients = []
    for _ in range(2):
        tuned.train().zero_grad()
        tuned(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in tuned.parameters() if p.requires_grad])
        logits(tuned.eval())
    assert all(map(torch.equal, *gradients))
