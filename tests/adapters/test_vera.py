"""VeRA trains two vectors a layer and keeps its random matrices in the delta, so that every base loads the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.vera.layer import VeraLayer
from safetensors.torch import load_file
from torch import nn

from llmtune import recipe
from llmtune.adapters.delta import load_delta, save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.errors import FieldError
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.model.base import Base, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import runs, tiny, training

IDS = torch.arange(3, 40)[None]
VERA: dict[str, Any] = {"kind": "vera", "rank": 8}
GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01, "adapter": VERA}
STAGED = {
    "kind": "staged",
    "stages": [{"until": 0.5, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.005}],
    "adapter": VERA,
}


def inserted(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[Any, dict[str, nn.Parameter], Base]:
    """A model with VeRA as a run inserts it, its trained vectors, and its base."""
    base = Base(tiny.save_base(folder / "base", kind, blocks=3), "base", None, None)
    method = training.spec({"kind": "full", "adapter": VERA | fields}).method
    model = load_model(base, dtype)
    plan = method.plan(model_facts(model))
    tuned = insert(model, method.adapter, plan, base)
    return tuned.eval(), trained_tensors(tuned, plan), base


def shake(tensors: dict[str, nn.Parameter]) -> None:
    """Move the vectors by noise."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.1)


def prepared(tmp_path: Path, name: str, method: dict[str, Any], **sections: Any) -> Run:
    """A prepared run on a tiny model of three blocks."""
    if not (tmp_path / "base").exists():
        tiny.save_base(tmp_path / "base", blocks=3, hidden=64)
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / f"{name}.json", tmp_path / "base", rows, method, **sections)
    return prepare(recipe.load(file), tmp_path / name, gpus=0)


def stored(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's delta."""
    return load_file(run.delta / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_start_equals_the_base_and_vectors_are_fp32(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tuned, tensors, base = inserted(tmp_path, kind, dtype)
    assert torch.equal(tuned(IDS).logits, load_model(base, dtype)(IDS).logits)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {name.split(".")[-2] for name in tensors} == {"vera_lambda_b", "vera_lambda_d"}
    shake(tensors)
    assert (tuned(IDS).logits - load_model(base, dtype)(IDS).logits).abs().max() > 0.02


def test_adapter_matches_its_formula_in_layers_of_every_shape(tmp_path: Path) -> None:
    tuned, tensors, _ = inserted(tmp_path)
    shake(tensors)
    layers = [module for module in tuned.modules() if isinstance(module, VeraLayer)]
    assert len({(layer.in_features, layer.out_features) for layer in layers}) == 4
    a, b = tuned.base_model.vera_A["default"], tuned.base_model.vera_B["default"]
    assert (a.shape, b.shape) == ((8, 64), (64, 8))
    for layer in layers:
        x = torch.randn(5, layer.in_features)
        scaled = x @ a[:, : layer.in_features].T * layer.vera_lambda_d["default"]
        update = scaled @ b[: layer.out_features].T * layer.vera_lambda_b["default"]
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


def test_seed_chooses_the_random_matrices(tmp_path: Path) -> None:
    same, again, other = (
        inserted(tmp_path, projection_seed=seed)[0].base_model.vera_A["default"] for seed in (3, 3, 4)
    )
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_delta_holds_the_matrices_so_that_no_seed_is_needed(tmp_path: Path) -> None:
    tuned, tensors, base = inserted(tmp_path, dtype=torch.bfloat16)
    shake(tensors)
    save_delta(tuned, dict(tensors), tmp_path / "delta", base, "vera")
    file = tmp_path / "delta" / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), "projection_prng_key": 99}))
    loaded = load_delta(load_model(base, torch.bfloat16), tmp_path / "delta")
    assert torch.equal(loaded(IDS).logits, tuned(IDS).logits)
    on_fp32: Any = load_delta(load_model(base), tmp_path / "delta")
    assert torch.equal(on_fp32.base_model.vera_A["default"], tuned.base_model.vera_A["default"])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_only_planned_vectors_move(tmp_path: Path, precision: torch.dtype) -> None:
    watch = training.Watch()
    model = tiny.model(blocks=3).to(precision)
    trainer = training.trainer(
        tmp_path, GRADUAL, model=model, callbacks=[watch], weight_decay=0.1, bf16=precision == torch.bfloat16
    )
    matrices = [trainer.model.base_model.vera_A["default"], trainer.model.base_model.vera_B["default"]]
    start = [matrix.clone() for matrix in matrices]
    trainer.train()
    assert all(map(torch.equal, matrices, start))
    end = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert {end[name].dtype for name in trainer.current_tensors()} == {torch.float32}
    for step, (before, after) in enumerate(zip(watch.before, [*watch.before[1:], end], strict=True)):
        moved = {name for name in end if not torch.equal(before[name], after[name])}
        reach = (1, 1, 2, 2, 3, 3)[step]
        planned = {name for name in trainer.current_tensors() if trainer.distance[name] <= reach}
        # The outer vector starts at 0, so the inner one has no gradient at its first step.
        first = {name for name in planned if step % 2 == 0 and trainer.distance[name] == reach}
        assert planned - {name for name in first if "lambda_d" in name} <= moved <= planned, f"step {step + 1}"


@pytest.mark.slow
@pytest.mark.parametrize("method", [GRADUAL, STAGED], ids=["gradual", "staged"])
def test_resumed_run_ends_bit_equal(tmp_path: Path, method: dict[str, Any]) -> None:
    sections = {"train": {"epochs": 1, "batch_size": 4, "save_every": 0.1, "keep": 99}}
    whole, again = (prepared(tmp_path, name, method, **sections) for name in ("whole", "again"))
    train(whole)
    assert 4 * sum(tensor.numel() for tensor in stored(whole).values()) == read_json(whole.plan_file)["delta_bytes"]
    train(again)
    checkpoints = complete_checkpoints(again.checkpoints)
    assert len(checkpoints) > 4
    for folder in [again.delta, *checkpoints[len(checkpoints) // 2 :]]:
        shutil.rmtree(folder)
    again.forget("train")
    train(again)
    assert set(stored(again)) == set(stored(whole))
    assert all(torch.equal(stored(again)[name], tensor) for name, tensor in stored(whole).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merges_into_the_base_with_proof(tmp_path: Path, quick: None, kind: str) -> None:
    run = runs.trained(tmp_path, {"kind": "full", "lr": 1e-3, "adapter": VERA}, kind, merge={"dtype": "float32"})
    proof = merge(run)
    assert proof["gap"] <= proof["bound"] == 1e-4
    assert proof["shift"] > 1e-2


@pytest.mark.slow
def test_trains_on_4bit_base_and_merges_into_the_original(tmp_path: Path, quick: None) -> None:
    model = {"base": str(tmp_path / "base"), "precision": "fp32", "quantize": "4bit"}
    method = {"kind": "full", "lr": 0.05, "adapter": VERA}
    run = prepared(tmp_path, "run", method, model=model, merge={"dtype": "float32"})
    assert read_json(run.plan_file)["quantized"] == 21
    train(run)
    base = locate_base(run.recipe().model)
    quantized: Any = load_model(base, keep=["lm_head"])
    assert sum(isinstance(module, Linear4bit) for module in quantized.modules()) == 21
    before = quantized(IDS).logits
    assert (load_delta(quantized, run.delta)(IDS).logits - before).abs().max() > 1e-2
    assert merge(run)["merged_into"] == "original"


def test_refuses_target_that_matches_no_layer(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"method\.adapter\.targets: .* did you mean 'q_proj'"):
        inserted(tmp_path, targets=["q_prjo"])
