"""A base stays in the dtype of its files while it is merged; outputs and merged weights are those of one in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from llmtune.adapters.delta import load_delta
from llmtune.errors import ProofError
from llmtune.merging import adding
from llmtune.merging.adding import add_delta, fp32_logits, load_compact
from llmtune.merging.compact import in_fp32, units
from llmtune.merging.digests import digests
from llmtune.merging.proof import logits
from llmtune.model.base import Base, load_model
from llmtune.model.files.locate import locate_base
from tests.support import architectures, runs, tiny

IDS = [list(range(3, 40)), list(range(80, 100))]
LORA, FROZEN = runs.LORA, {"kind": "frozen", "reach": 1, "lr": 1e-3}
BOTTLENECK = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "bottleneck", "size": 4}}


def save_bf16(folder: Path, kind: str) -> Path:
    """A base whose files are in bf16."""
    architectures.model(kind).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), ("gemma3_text", torch.bfloat16), ("gpt_oss", torch.bfloat16), ("mamba", torch.float32)],
)
def test_outputs_are_those_in_fp32_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = Base(save_bf16(tmp_path, kind), "base", None, None)
    weights, actual = load_compact(base, IDS)
    assert torch.equal(actual, logits(load_model(base), IDS))
    assert {one.dtype for one in weights.parameters()} == {dtype}  # Mamba's blocks read weights around their modules


def widened(tuned: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count, whenever a part of a model is about to compute, the base's tensors that are in fp32."""
    wide: list[int] = []
    add = adding.add_adapters

    def count(unit: nn.Module) -> None:
        add(unit)
        wide.append(sum(one.dtype == torch.float32 and "lora" not in name for name, one in tuned.named_parameters()))

    monkeypatch.setattr(adding, "add_adapters", count)
    return wide


@pytest.mark.parametrize("method", [LORA, FROZEN, BOTTLENECK], ids=["lora", "frozen", "bottleneck"])
def test_merged_weights_are_those_of_a_base_in_fp32_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    run = runs.trained(tmp_path, method, base=save_bf16(tmp_path / "base", "llama"), step=0.3)
    base = locate_base(run.recipe().model)
    whole: Any = load_delta(load_model(base), run.delta)
    live = logits(whole, IDS)
    whole = whole.merge_and_unload() if isinstance(whole, PeftModel) else whole
    exact = logits(whole, IDS)
    tuned = load_delta(load_compact(base, IDS)[0], run.delta, as_stored=True)
    assert torch.equal(fp32_logits(tuned, IDS), live)
    wide = widened(tuned, monkeypatch)
    merged, actual = add_delta(tuned, torch.bfloat16, IDS)
    assert torch.equal(actual, exact)
    # The embeddings, with each block, with the final norm, and as the head; a bottleneck widens the model as a whole.
    assert wide == {"lora": [1, 10, 10, 2, 1], "bottleneck": []}.get(str(method.get("adapter", {}).get("kind")), wide)
    expected = whole.to(torch.bfloat16).state_dict()
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_adapter_that_the_model_does_not_run_is_refused(tmp_path: Path) -> None:
    run = runs.trained(tmp_path, LORA, base=save_bf16(tmp_path / "base", "llama"), step=0.3)
    tuned: Any = load_delta(load_compact(locate_base(run.recipe().model), IDS)[0], run.delta, as_stored=True)
    tuned.config.num_hidden_layers -= 1
    with pytest.raises(ProofError, match=r"layers\.\d\..* is adapted, but the model does not run it"):
        add_delta(tuned, torch.bfloat16, IDS)


@pytest.mark.parametrize("method", [LORA, BOTTLENECK], ids=["lora", "bottleneck"])
def test_weights_that_would_not_be_finite_are_refused(tmp_path: Path, method: dict[str, Any]) -> None:
    run = runs.trained(tmp_path, method, base=save_bf16(tmp_path / "base", "llama"), step=0.3)
    tuned: Any = load_delta(load_model(locate_base(run.recipe().model)), run.delta)
    adapted = next(parameter for name, parameter in tuned.named_parameters() if "default" in name)
    with torch.no_grad():
        adapted.flatten()[0] = torch.nan
    with pytest.raises(ProofError, match="not finite"):
        add_delta(tuned, torch.bfloat16, IDS)


def test_units_hold_every_parameter_once_and_changes_are_dropped() -> None:
    model = tiny.model().to(torch.bfloat16)
    held = {id(parameter) for unit in units(model) for parameter in unit.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}
    before, plain = digests(model, torch.bfloat16, "it"), fp32_logits(model, IDS)

    def enlarge(number: int, weight: torch.Tensor) -> None:
        weight.mul_(1.5)

    with in_fp32(model, enlarge):
        assert not torch.equal(logits(model, IDS), plain)
    assert digests(model, torch.bfloat16, "it") == before
    with pytest.raises(IndexError), in_fp32(model):  # a token that the embeddings do not have
        next(units(model))(torch.tensor([[10**6]]))
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
