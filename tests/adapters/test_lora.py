"""The LoRA family: what is adapted at which rank, and starts whose delta fits the base as it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from llmtune import recipe
from llmtune.adapters import lora_starts
from llmtune.adapters.delta import load_delta, save_delta
from llmtune.adapters.insert import insert
from llmtune.adapters.lora_starts import INITIAL
from llmtune.errors import FieldError, RecipeError, TrainingError
from llmtune.files import read_json
from llmtune.model.base import Base, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import tiny, training

IDS = torch.arange(3, 40)[None]
STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa-rslora-dora": {"init": "pissa", "rslora": True, "dora": True},
    "olora-patterns": {"init": "olora", "ranks": {"q_proj": 2, ".*mlp.*": 6}, "alphas": {"up_proj": 3}},
    "orthogonal": {"init": "orthogonal"},
    "gaussian": {"init": "gaussian"},
}


def inserted(folder: Path, adapter: dict[str, Any], kind: str = "llama", method: Any = None) -> tuple[Any, Base, Any]:
    """A model with an adapter as a run inserts it, its base, and the adapter's spec."""
    if not (folder / "base").exists():
        tiny.save_base(folder / "base", kind, blocks=3)
    base = Base(folder / "base", "base", None, None)
    settings = training.spec({**(method or {"kind": "full"}), "adapter": {"kind": "lora", "rank": 4, **adapter}})
    model = load_model(base)
    tuned = insert(model, settings.method.adapter, settings.method.plan(model_facts(model)), base)
    settings.method.adapter.move_weight(tuned, folder, resumes=False, device="cpu")
    return tuned.eval(), base, settings.method.adapter


def layers(tuned: Any) -> dict[str, LoraLayer]:
    """The adapted layers by name."""
    return {name: module for name, module in tuned.named_modules() if isinstance(module, LoraLayer)}


def shake(tuned: Any) -> torch.Tensor:
    """Logits of the model after its adapter moved by noise."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return tuned(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("start", [start for start in STARTS if start != "olora-patterns"])
def test_start_keeps_the_output_and_its_delta_fits_the_original_base(tmp_path: Path, start: str, kind: str) -> None:
    tuned, base, spec = inserted(tmp_path, STARTS[start], kind)
    untouched = load_model(base)
    torch.testing.assert_close(tuned(IDS).logits, untouched(IDS).logits, rtol=0, atol=1e-5)
    moved = {
        not torch.equal(layer.get_base_layer().weight, untouched.get_submodule(name[17:]).weight)
        for name, layer in layers(tuned).items()
    }
    assert moved == {spec.takes_weight}
    expected = shake(tuned)
    assert (expected - untouched(IDS).logits).abs().max() > 0.05
    save_delta(tuned, dict(tuned.named_parameters()), tmp_path / "delta", base, "lora")
    torch.testing.assert_close(load_delta(untouched, tmp_path / "delta")(IDS).logits, expected, rtol=0, atol=1e-5)


def test_pissa_starts_from_the_principal_part(tmp_path: Path) -> None:
    tuned, base, _ = inserted(tmp_path, {"init": "pissa"})
    untouched = load_model(base)
    for name, layer in layers(tuned).items():
        weight = untouched.get_submodule(name[17:]).weight
        values = torch.linalg.svdvals(weight)
        rest = torch.linalg.svdvals(layer.get_base_layer().weight)
        torch.testing.assert_close(rest[: len(values) - 4], values[4:], rtol=0, atol=1e-4)


def prepared(tmp_path: Path, name: str, adapter: dict[str, Any], **sections: Any) -> Run:
    """A prepared run of three stages with an adapter."""
    if not (tmp_path / "base").exists():
        tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    method = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01, "adapter": {"kind": "lora", "rank": 4, **adapter}}  # fmt: skip # noqa: E501
    file = tiny.write_recipe(tmp_path / f"{name}.yaml", tmp_path / "base", data, method, **sections)
    return prepare(recipe.load(file), tmp_path / name, gpus=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_resumed_run_with_a_start_ends_bit_equal(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {"train": {"epochs": 1, "batch_size": 4, "save_every": 0.1, "keep": 99}}
    whole, again = (prepared(tmp_path, name, {"init": start}, **every) for name in ("whole", "again"))
    train(whole)
    plan, stored = read_json(whole.plan_file), load_file(whole.delta / "adapter_model.safetensors")
    assert 4 * sum(tensor.numel() for tensor in stored.values()) == plan["delta_bytes"] == 8 * plan["trained"]
    train(again)
    for folder in [again.delta, *complete_checkpoints(again.checkpoints)[3:]]:
        shutil.rmtree(folder)
    again.forget("train")
    monkeypatch.setattr(lora_starts, "_write_start", lambda *_: pytest.fail("a resumed run computed its start again"))
    train(again)
    resumed = load_file(again.delta / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in stored.items())
    tuned, base = load_model(locate_base(whole.recipe().model)), whole.delta
    before = tuned(IDS).logits
    assert not torch.equal(load_delta(tuned, base)(IDS).logits, before)


@pytest.mark.slow
def test_refuses_to_resume_without_its_start(tmp_path: Path) -> None:
    stopped = prepared(tmp_path, "run", {"init": "pissa"})
    train(stopped)
    stopped.forget("train")
    (stopped.checkpoints / INITIAL).unlink()
    with pytest.raises(TrainingError, match="cannot go on"):
        train(stopped)


def test_patterns_set_ranks_and_alphas_of_matching_layers(tmp_path: Path) -> None:
    tuned, _, _ = inserted(tmp_path, {"alpha": 8, "ranks": {"q_proj": 2, "layers.1.mlp.*": 6}, "alphas": {"k_proj": 1}})
    for name, layer in layers(tuned).items():
        rank = 2 if name.endswith("q_proj") else 6 if ".layers.1.mlp." in name else 4
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == (1 if name.endswith("k_proj") else 8) / rank


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("top", {2}), ("middle", {1}), ("bottom", {0}), ([1, 3], {0, 2}), ("all", {0, 1, 2})],
)
def test_layers_chooses_blocks(tmp_path: Path, chosen: Any, expected: set[int]) -> None:
    tuned, _, _ = inserted(tmp_path, {"layers": chosen})
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in layers(tuned)} == expected


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"ranks": {"q_prj": 2}}, "ranks: 'q_prj' matches none of the adapted layers; did you mean 'q_proj'"),
        ({"alphas": {"layers.7": 2}}, "alphas: 'layers.7' matches none"),
        ({"targets": ["mlp"]}, "'mlp' is a LlamaMLP, and adapters go to linear layers"),
        ({"targets": ["embed_tokens"], "dora": True}, "'embed_tokens' is a Embedding"),
        ({"targets": ["q_proj", "lm_head"]}, "'lm_head' is the head"),
        ({"layers": [1, 9]}, "distance 9 is beyond the model, which has 3 blocks; try 3"),
        ({"init": "loftq"}, "loftq fits a quantized base"),
        ({"init": "eva"}, "eva starts from activations"),
        ({"init": "pisa"}, "did you mean 'pissa'"),
        ({"init": "orthogonal", "rank": 3}, "even ranks, not 3; try 4"),
        ({"init": "pissa", "rank": 17}, "takes at most rank 16"),
    ],
)
def test_refuses_impossible_adapter_by_name(tmp_path: Path, adapter: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(tmp_path, "run", adapter)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_layers_beyond_the_plans_reach(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"layers: names no block that trains; the plan reaches distance 1"):
        inserted(tmp_path, {"layers": "bottom"}, method={"kind": "frozen", "reach": 1})


def test_refuses_weight_start_on_4bit_base(tmp_path: Path) -> None:
    model = {"base": str(tmp_path / "base"), "precision": "fp32", "quantize": "4bit"}
    with pytest.raises(RecipeError, match=r"init: takes weight out of the base, which is rounded to few bits"):
        prepared(tmp_path, "run", {"init": "pissa"}, model=model)
