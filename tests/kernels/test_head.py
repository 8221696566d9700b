"""The loss in the head, in chunks: the plain path's losses and gradients, and never the logits of all positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from llmtune.data.batches.collate import Collator
from llmtune.kernels import head as head_module
from llmtune.kernels.head import LOGIT_BYTES, Supervised, SupervisedHead, head_loss, rows_at_once
from llmtune.kernels.logit_scale import LogitScale, logit_probe, recognize
from llmtune.model.blocks import blocks
from tests.support import architectures, training
from tests.support.cached import LORA
from tests.training.test_joined import plainly

QUICK = ("llama", "gemma2", "granite", "cohere2", "gpt2", "opt")
CASES = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in architectures.KINDS]
VOCABULARY = 259
Result = tuple[float, dict[str, torch.Tensor]]


def in_head(monkeypatch: pytest.MonkeyPatch, rows: int = 5) -> list[int]:
    """Compute losses in the head on CPUs too, that many rows at a time; the list gets the rows of every loss."""
    taken: list[int] = []

    def watched(head: nn.Linear, hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        taken.append(len(hidden))
        return head_loss(head, hidden, *others)

    monkeypatch.setattr(head_module, "computes_in_head", lambda device: True)
    monkeypatch.setattr(head_module, "HEAD_CHUNK_BYTES", rows * VOCABULARY * LOGIT_BYTES)
    monkeypatch.setattr(head_module, "head_loss", watched)
    return taken


def step(folder: Path, model: PreTrainedModel, adapter: Any = "none", **arguments: Any) -> Result:
    """Loss and gradients of two micro-batches."""
    trainer = training.trainer(folder, {"kind": "full", "lr": 0.01, "adapter": adapter}, model=model, **arguments)
    trainer.model.train()
    total = 0.0
    for start in (0, 4):
        loss = trainer.compute_loss(trainer.model, Collator(0)(training.rows(8)[start : start + 4]), False, 60)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def distance(ours: Result, plain: Result) -> float:
    """How far gradients are apart, relative in the norm, or losses, whatever is more."""
    assert set(ours[1]) == set(plain[1])
    whole = torch.cat([gradient.flatten() for gradient in plain[1].values()])
    apart = torch.cat([(ours[1][name] - gradient).flatten() for name, gradient in plain[1].items()])
    return max(float(apart.norm() / whole.norm()), abs(ours[0] - plain[0]) / plain[0])


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.parametrize("kind", CASES)
def test_matches_the_plain_loss_and_gradients(
    tmp_path: Path, kind: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly(monkeypatch)
    plain = step(tmp_path, architectures.model(kind), adapter)
    taken = in_head(monkeypatch)
    ours = step(tmp_path, architectures.model(kind), adapter)
    assert len(taken) == 2
    assert taken[0] % 5
    assert distance(ours, plain) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_bf16_is_no_farther_from_fp32_than_the_plain_path(
    tmp_path: Path, kind: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly(monkeypatch)
    exact = step(tmp_path, architectures.model(kind), adapter)
    plain = step(tmp_path, architectures.model(kind), adapter, bf16=True)
    in_head(monkeypatch)
    ours = step(tmp_path, architectures.model(kind), adapter, bf16=True)
    assert 0 < distance(ours, exact) <= max(1.1 * distance(plain, exact), 2e-3)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("count", [1, 13])
def test_any_chunk_size_gives_the_same_gradients_of_every_input(
    rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_head(monkeypatch, rows)
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, VOCABULARY), torch.randn(count, 16, requires_grad=True)
    targets, scale = torch.randint(0, VOCABULARY, (count,)), LogitScale(0.5, 2.0)
    inputs = (hidden, head.weight, head.bias)
    value = head_loss(head, hidden, targets, scale) / 7
    expected = functional.cross_entropy(scale(head(hidden)), targets, reduction="sum") / 7
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for ours, plain in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert float((ours - plain).norm() / plain.norm()) <= 1e-6


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the largest number of bytes that an operation returned in new tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_the_logits_of_all_positions(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, width, count = 4096, 8, 2000
    monkeypatch.setattr(head_module, "HEAD_CHUNK_BYTES", 100 * vocabulary * LOGIT_BYTES)
    assert rows_at_once(vocabulary) == 100
    head = nn.Linear(width, vocabulary, bias=False).to(precision)
    hidden = torch.randn(count, width).to(precision).requires_grad_()
    with Largest() as largest:
        torch.autograd.backward(head_loss(head, hidden, torch.zeros(count, dtype=torch.long), LogitScale()))
    assert largest.bytes == 100 * vocabulary * 4
    assert 10 * largest.bytes < count * vocabulary * 4


def test_a_frozen_head_takes_no_gradient_and_validation_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = nn.Linear(8, 64, bias=False), torch.randn(4, 8, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4])
    head.weight.requires_grad_(False)
    add_product, sums = head_module.add_product, list[torch.Size]()

    def watched(total: torch.Tensor, *factors: torch.Tensor) -> None:
        sums.append(total.shape)
        add_product(total, *factors)

    monkeypatch.setattr(head_module, "add_product", watched)
    torch.autograd.backward(head_loss(head, hidden, targets, LogitScale()))
    assert sums == [hidden.shape]
    assert head.weight.grad is None
    monkeypatch.setattr(head_module, "loss_and_gradient", None)
    with torch.no_grad():
        value = head_loss(head, hidden, targets, LogitScale())
    torch.testing.assert_close(value, functional.cross_entropy(head(hidden), targets, reduction="sum"))
    assert not value.requires_grad


@pytest.mark.parametrize("right", [True, False])
def test_a_device_that_adds_to_fp32_at_once_is_tried_first(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left, other = torch.randn(5, 8).bfloat16(), torch.randn(8, 3).bfloat16()
    expected, calls = 1 + left.float() @ other.float(), list[int]()

    def addmm(total: torch.Tensor, *factors: torch.Tensor, out_dtype: torch.dtype, out: torch.Tensor) -> None:
        calls.append(len(total))
        out += right * (factors[0].to(out_dtype) @ factors[1].to(out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    head_module.adds_to_fp32.cache_clear()
    total = torch.ones(5, 3)
    head_module.add_product(total, left, other)
    head_module.adds_to_fp32.cache_clear()
    torch.testing.assert_close(total, expected)
    assert calls == ([16, 5] if right else [16])


def test_refuses_a_second_backward_pass() -> None:
    head, hidden = nn.Linear(8, 64), torch.randn(4, 8, requires_grad=True)
    loss = head_loss(head, hidden, torch.tensor([1, 2, 3, 4]), LogitScale())
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="were used by an earlier backward pass"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("scale", [LogitScale(), LogitScale(1 / 3), LogitScale(1.0, 30.0), LogitScale(0.25, 50.0)])
def test_recognizes_what_a_model_does_with_its_heads_outputs(scale: LogitScale) -> None:
    probe = logit_probe(VOCABULARY, torch.device("cpu"))
    found = recognize(probe, scale(probe))
    assert found is not None
    assert (found.scale, found.cap or 0.0) == pytest.approx((scale.scale, scale.cap or 0.0), rel=1e-6)
    assert recognize(probe, scale(probe)[:, :-1]) is None
    assert recognize(probe, torch.relu(scale(probe))) is None
    assert recognize(probe, scale(probe) + 1) is None


class Odd(nn.Module):
    """A model that does with its head's outputs what no `LogitScale` does, and counts how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.ran = nn.Linear(8, 64), 0

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, hidden: torch.Tensor) -> Any:
        self.ran += 1
        return {"logits": torch.relu(self.lm_head(hidden))}


def test_a_model_that_is_not_recognized_gives_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_head(monkeypatch)
    model: Any = Odd()
    head, hidden, zero = SupervisedHead(model), torch.randn(2, 3, 8), torch.tensor([0])
    whole = model(hidden)["logits"]
    for runs in (3, 4):
        with head.at(Supervised(zero + 1, zero + 2, zero)):
            outputs = model(hidden)
        assert "loss" not in outputs
        torch.testing.assert_close(outputs["logits"], whole[1, 2:])
        assert model.ran == runs


def test_a_head_that_an_adapter_changes_gives_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = in_head(monkeypatch)
    base = architectures.model("llama", tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    batch = Collator(0)(training.rows(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**inputs).logits[batch["rows"], batch["columns"]]
    with SupervisedHead(base).at(Supervised(batch["rows"], batch["columns"], batch["rows"])):
        outputs = model(**inputs)
    assert not taken
    assert outputs.loss is None
    torch.testing.assert_close(outputs.logits, whole)


@pytest.mark.slow
def test_a_block_compiles_as_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly(monkeypatch)
    in_head(monkeypatch)

    def compiled(backend: str) -> PreTrainedModel:
        model = architectures.model("llama")
        blocks(model)[0].compile(backend=backend, fullgraph=True, dynamic=True)
        return model

    plain = step(tmp_path, architectures.model("llama"), LORA, bf16=True)
    assert distance(step(tmp_path, compiled("eager"), LORA, bf16=True), plain) == 0
