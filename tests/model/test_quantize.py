"""Puts layers that never train into 4 bits, with and without an adapter, and trains the others exactly."""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.errors import RecipeError, TrainingError
from llmtune.estimate.memory import Setting, forecast
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.model.base import Base, build_skeleton, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.model.quantize import INT8_BYTES, load_quantized, split_linear_layers
from llmtune.run import Run
from llmtune.training.loop import train
from llmtune.training.objective import SupervisedTrainer
from llmtune.training.prepare import layout_of, prepare
from tests.support import runs, tiny, training

LORA = {"kind": "lora", "rank": 4}
TOP = {"kind": "gradual", "reaches": [1, 2], "lr": 0.01}


def quantized_run(
    tmp_path: Path,
    method: dict[str, Any],
    kind: str = "llama",
    name: str = "run",
    quantize: str = "4bit",
    **sections: Any,
) -> Run:
    """A prepared run with quantized layers on a tiny base."""
    base = tmp_path / "base"
    if not base.exists():
        tiny.save_base(base, kind, blocks=3, hidden=64)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    section = {"base": str(base), "precision": "fp32", "quantize": quantize}
    file = tiny.write_recipe(tmp_path / f"{name}.yaml", base, data, method, model=section, **sections)
    return prepare(recipe.load(file), tmp_path / name, gpus=0)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the models that train, before they do."""
    seen: list[Any] = []
    original = SupervisedTrainer.train

    def look(self: Any, **named: Any) -> Any:
        seen.append(self)
        return original(self, **named)

    monkeypatch.setattr(SupervisedTrainer, "train", look)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("llama", False), ("llama", True), ("gpt2", False), ("gpt_neox", False)],
    ids=["llama", "checkpointing", "gpt2", "gpt_neox"],
)
def test_quantizes_what_never_trains_and_merges_into_the_16_bit_base(
    tmp_path: Path, kind: str, adapter: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    section = {"epochs": 1, "batch_size": 4, "activation_checkpointing": checkpointing}
    done = quantized_run(tmp_path, TOP | {"adapter": adapter}, kind, train=section, merge={"dtype": "float32"})
    train(done)
    trainer = seen[0]
    packed = {n for n, m in trainer.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(packed) == read_json(done.plan_file)["quantized"] > 0
    trained = trainer.current_tensors()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert not {name.removesuffix(".weight") for name in trained} & packed
    if adapter == "none":
        assert {trainer.distance[f"{name}.weight"] for name in packed} == {3}
    else:
        assert {trainer.distance[f"{name}.weight"] for name in packed if "base_layer" in name} == {1, 2}
        assert len(packed) > len([name for name in packed if "base_layer" in name])
    base = locate_base(done.recipe().model)
    stored = load_file(next(done.delta.glob("*.safetensors")))
    assert 4 * sum(tensor.numel() for tensor in stored.values()) == read_json(done.plan_file)["delta_bytes"]
    ids = torch.arange(3, 40)[None]
    tuned = load_delta(load_model(base), done.delta)(ids).logits
    assert (tuned - load_model(base)(ids).logits).abs().max() > 0.02
    if kind != "llama" or checkpointing:
        return
    facts = merge(done)
    assert facts["merged_into"] == "original"
    merged = load_model(Base(done.merged, "merged", None, None))
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=0, atol=facts["bound"])


def test_loads_the_4bit_model_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    # Else the trained model, which is asked again here, has cached outputs in place of its lowest blocks.
    recompute = {"frozen_blocks": "recompute"}
    done = quantized_run(tmp_path, {"kind": "frozen", "reach": 1, "lr": 0.01}, memory=recompute)
    train(done)
    settings, base = done.recipe(), locate_base(done.recipe().model)
    skeleton = build_skeleton(base)
    linear = split_linear_layers(skeleton, settings.plan(model_facts(skeleton)), adapted=False)
    again = load_delta(load_quantized(base, linear, torch.float32), done.delta)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(again(ids).logits, seen[0].model.eval()(ids).logits)


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "frozen", "reach": 3}, {"kind": "gradual"}])
def test_refuses_nothing_to_quantize_before_weights_load(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(RecipeError, match=r"model\.quantize: 4bit is for linear layers that never train") as caught:
        quantized_run(tmp_path, method)
    assert "\n" not in str(caught.value)


def test_refuses_to_train_a_quantized_tensor(tmp_path: Path) -> None:
    base = locate_base(quantized_run(tmp_path, {"kind": "frozen", "reach": 1}).recipe().model)
    loaded = load_model(base, keep=["lm_head"])
    with pytest.raises(TrainingError, match=r"should train but is quantized"):
        training.trainer(tmp_path / "out", {"kind": "full", "lr": 0.01}, model=loaded)


def test_refuses_another_set_in_4_bits_than_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quantized_run(tmp_path, {"kind": "frozen", "reach": 1}).recipe()
    base = locate_base(settings.model)
    skeleton = build_skeleton(base)
    linear = split_linear_layers(skeleton, settings.plan(model_facts(skeleton)), adapted=False)
    loaded = load_model(base)
    monkeypatch.setattr("llmtune.model.quantize.load_model", lambda *_: loaded)
    with pytest.raises(TrainingError, match="not in 4 bits, against the plan"):
        load_quantized(base, linear, torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what a process has mapped")
def test_unmaps_what_was_read_to_be_quantized(tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    done = quantized_run(tmp_path, {"kind": "full", "lr": 0.01, "adapter": LORA})
    settings = done.recipe()
    base = locate_base(settings.model)
    plain = load_model(base, torch.float32)
    assert mapped()
    del plain
    gc.collect()
    skeleton = build_skeleton(base)
    linear = split_linear_layers(skeleton, settings.plan(model_facts(skeleton)), adapted=False)
    loaded = load_quantized(base, linear, torch.float32)
    gc.collect()
    assert not mapped()
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_trains_over_8_bits_and_merges_into_the_original_base(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    section = {"max_steps": 1, "batch_size": 4}
    method = {"kind": "frozen", "reach": 1, "lr": 0.01, "adapter": LORA}
    done = quantized_run(tmp_path, method, kind, quantize="8bit", train=section, merge={"dtype": "float32"})
    assert done.recipe().method_words == "LoRA (rank 4) under a frozen extractor, over an 8-bit base"
    if kind == "gpt2":
        runs.perturbed(done)
    else:
        train(done)
        packed = {n for n, m in seen[0].model.named_modules() if isinstance(m, Linear8bitLt)}
        assert len(packed) == read_json(done.plan_file)["quantized"] == 21
        assert {seen[0].model.get_submodule(name).weight.dtype for name in packed} == {torch.int8}
        assert "is in 8 bits, whose outputs for a row depend" in done.log_file.read_text()
    runs.reload_here(monkeypatch)
    facts = merge(done)
    assert facts["merged_into"] == "original"
    assert 0 < facts["gap_to_8bit"]["original"]["max"] < 0.1
    base = locate_base(done.recipe().model)
    ids = torch.arange(3, 40)[None]
    tuned = load_delta(load_model(base), done.delta)(ids).logits
    torch.testing.assert_close(load_model(Base(done.merged, "m", None, None))(ids).logits, tuned, rtol=0, atol=1e-4)
    layout = layout_of(done.recipe())
    whole = layout_of(
        done.recipe().model_copy(update={"model": done.recipe().model.model_copy(update={"quantize": "none"})})
    )
    setting = Setting("cuda", torch.bfloat16)
    count = sum(layout.skeleton.get_submodule(name).weight.numel() for name in layout.linear[0])
    saved = (
        forecast(whole, setting, 8).stages[0].parts["weights"] - forecast(layout, setting, 8).stages[0].parts["weights"]
    )
    assert saved == pytest.approx((2 - INT8_BYTES) * count, abs=1)


def test_refuses_to_shard_8_bits_before_weights_load(tmp_path: Path) -> None:
    method = {"kind": "full", "lr": 0.01, "adapter": LORA}
    with pytest.raises(RecipeError, match=r"launch\.accelerate: weights in 8 bits cannot be sharded; try ddp"):
        quantized_run(tmp_path, method, quantize="8bit", launch={"accelerate": "fsdp2"})
