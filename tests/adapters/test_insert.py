"""Adapters go where the plan trains, and a delta is loaded whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.adapters import delta
from llmtune.adapters.delta import load_delta, save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.errors import FieldError, ProofError
from llmtune.model.base import Base, load_model, model_facts
from tests.support import tiny, training

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ADAPTERS: dict[str, Any] = {
    "none": {"kind": "none"},
    "lora": LORA,
    "dora": LORA | {"dora": True},
    "rslora": LORA | {"rslora": True},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
}


def inserted(tmp_path: Path, method: dict[str, Any], kind: str = "llama", **more: Any) -> tuple[Any, Any, Base, Any]:
    """An adapted model with shaken trained tensors, those tensors, its base, and the recipe."""
    base = Base(tiny.save_base(tmp_path / "base", kind, blocks=3, **more), "someone/base", "abc", "someone/base")
    model = load_model(base)
    recipe = training.spec(method)
    plan = recipe.method.plan(model_facts(model))
    adapted = insert(model, recipe.method.adapter, plan, base)
    tensors = trained_tensors(adapted, plan)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    return adapted.eval(), tensors, base, recipe


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "frozen", "reach": 1}], ids=["full", "frozen"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loaded_delta_equals_the_live_model(tmp_path: Path, adapter: str, method: dict[str, Any]) -> None:
    live, tensors, base, _ = inserted(tmp_path, {**method, "adapter": ADAPTERS[adapter]})
    save_delta(live, tensors, tmp_path / "delta", base, ADAPTERS[adapter]["kind"])
    ids = torch.arange(3, 40)[None]
    loaded = load_delta(load_model(base), tmp_path / "delta")
    assert torch.equal(loaded(ids).logits, live(ids).logits)
    assert not torch.equal(load_model(base)(ids).logits, live(ids).logits)
    facts_of = json.loads((tmp_path / "delta" / "base.json").read_text())
    assert (facts_of["base"], facts_of["revision"]) == ("someone/base", "abc")


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_writes_the_delta_completely_or_not_at_all(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, tensors, base, _ = inserted(tmp_path, {"kind": "full", "adapter": ADAPTERS[adapter]})

    def stop(path: Path, value: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(delta, "write_json", stop)
    with pytest.raises(OSError, match="the disk is full"):
        save_delta(live, tensors, tmp_path / "delta", base, ADAPTERS[adapter]["kind"])
    assert not list(tmp_path.glob("*delta*"))


@pytest.mark.slow
def test_peft_alone_loads_the_adapter_in_a_fresh_process(tmp_path: Path) -> None:
    live, tensors, base, _ = inserted(tmp_path, {"kind": "full", "adapter": LORA})
    save_delta(live, tensors, tmp_path / "delta", base, "lora")
    script = (
        "import sys, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()\n"
        "torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[3])"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, base.folder, tmp_path / "delta", out], check=True, cwd="/")
    assert torch.equal(torch.load(out, weights_only=True), live(torch.arange(3, 40)[None]).logits)


def test_saves_only_trained_tensors(tmp_path: Path) -> None:
    live, tensors, base, _ = inserted(tmp_path, {"kind": "frozen", "reach": 1}, tied=False)
    save_delta(live, tensors, tmp_path / "delta", base, "none")
    stored = load_file(tmp_path / "delta" / "trained.safetensors")
    assert (
        set(stored) == {n for n in stored if n.startswith(("model.layers.2.", "model.norm", "lm_head"))} == set(tensors)
    )
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


@pytest.mark.parametrize(
    ("adapter", "harm"),
    [
        *(("lora", harm) for harm in ("missing", "unexpected", "renamed", "shape")),
        *(("none", harm) for harm in ("unexpected", "renamed", "shape")),
        *(("vera", harm) for harm in ("missing", "unexpected", "renamed", "shape")),
    ],
)
def test_refuses_delta_that_does_not_fit(tmp_path: Path, adapter: str, harm: str) -> None:
    live, tensors, base, _ = inserted(tmp_path, {"kind": "full", "adapter": ADAPTERS[adapter]})
    save_delta(live, tensors, tmp_path / "delta", base, ADAPTERS[adapter]["kind"])
    file = tmp_path / "delta" / ("trained.safetensors" if adapter == "none" else "adapter_model.safetensors")
    stored = load_file(file)
    name = sorted(stored)[0]
    if harm == "missing":
        del stored[name]
    elif harm == "unexpected":
        stored["no.such.weight"] = torch.zeros(2)
    elif harm == "renamed":
        stored[name.replace("0", "7", 1) if "0" in name else name + "x"] = stored.pop(name)
    else:
        stored[name] = torch.zeros(3, 5)
    save_file(stored, file)
    with pytest.raises(ProofError):
        load_delta(load_model(base), tmp_path / "delta")


def test_adapts_only_blocks_that_train(tmp_path: Path) -> None:
    _, tensors, _, _ = inserted(tmp_path, {"kind": "frozen", "reach": 1, "adapter": LORA})
    assert tensors
    assert all(".layers.2." in name for name in tensors)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_proj", "nope_proj"], "'nope_proj' matches no linear layer"), (["q_prjo"], "did you mean 'q_proj'")],
)
def test_refuses_target_that_matches_no_layer(tmp_path: Path, targets: list[str], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        inserted(tmp_path, {"kind": "full", "adapter": LORA | {"targets": targets}})


def test_refuses_adapter_out_of_the_plans_reach(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="no adapter would train"):
        inserted(tmp_path, {"kind": "frozen", "reach": 0, "adapter": LORA})
