"""What a trace predicts that a pass keeps is what autograd saves on a real model, on every architecture."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from llmtune.adapters.insert import insert, trained_tensors
from llmtune.errors import FieldError
from llmtune.estimate import activations
from llmtune.estimate.activations import as_trained, head_of, one_position, trace, weight_shapes
from llmtune.estimate.autocast import change_tensors
from llmtune.model.base import model_facts
from llmtune.model.blocks import blocks, unwrap
from llmtune.plan.stages import Plan
from tests.support import architectures, training
from tests.support.matrix import ADAPTERS
from tests.support.training import BASE

TOKENS = 97
"""Odd, as a prediction has it; and no width of a tiny model."""
PAIRS = [(kind, list(ADAPTERS)[number % len(ADAPTERS)]) for number, kind in enumerate(architectures.KINDS)]
SAMPLE = ["gemma2", "gpt2", "falcon", "mixtral", "deepseek_v3", "mamba2"]


class Saved:
    """The storages that autograd saves, and that blocks are given, but for weights, their 16-bit copies and ids."""

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        known = [*model.parameters(), *model.buffers(), ids]
        self._known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in known}
        self._shapes = weight_shapes(model)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._known and tuple(tensor.shape) not in self._shapes:
            self.storages[id(storage)] = storage
        return tensor

    def add_inputs(self, module: nn.Module, arguments: Any, options: Any) -> None:
        """Note what a block is called with."""
        change_tensors((arguments, options), self.add)

    @property
    def bytes(self) -> int:
        """Bytes of all."""
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def hooked(model: nn.Module, saved: Saved, checkpointing: bool) -> Iterator[None]:
    """Note in `saved` what a forward pass keeps."""
    if checkpointing:
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
        unwrap(model).disable_input_require_grads()
    with ExitStack() as stack:
        stack.callback(head_of(model).register_forward_pre_hook(one_position).remove)
        for block in blocks(model) if checkpointing else ():
            stack.callback(block.register_forward_pre_hook(saved.add_inputs, with_kwargs=True).remove)
        stack.enter_context(saved_tensors_hooks(saved.add, lambda tensor: tensor))
        yield


def kept(model: nn.Module, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that a real forward pass on the CPU keeps."""
    ids = torch.randint(3, 200, (1, TOKENS))
    model = copy.deepcopy(model)
    saved = Saved(model, ids)
    mixed = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with hooked(model, saved, checkpointing), mixed:
        unwrap(model)(input_ids=ids, use_cache=False)
    return saved.bytes


def tuned(kind: str, adapter: str, method: dict[str, Any] | None = None) -> tuple[nn.Module, Plan]:
    """A tiny model with an adapter in it, or `pytest.skip`'s counterpart: plain where the adapter refuses the model."""
    for name in (adapter, "none"):
        model = architectures.model(kind)
        spec = training.spec({**(method or {"kind": "full"}), "lr": 1e-3, "adapter": ADAPTERS[name]})
        plan = spec.method.plan(model_facts(model))
        try:
            return insert(model, spec.method.adapter, plan, BASE), plan
        except FieldError:
            continue
    raise AssertionError(kind)


def check(kind: str, adapter: str, dtype: torch.dtype, method: dict[str, Any] | None = None) -> None:
    """Assert that the prediction is within a tenth of what a real pass keeps, with and without checkpointing.

    Where a block does not train, hooks see what checkpointing saves for it and drops again.
    """
    whole, plan = tuned(kind, adapter, method)
    names = set(trained_tensors(whole, plan))
    real = as_trained(whole, names, names, dtype)
    predicted = trace(as_trained(whole.to("meta"), names, names, dtype), TOKENS, dtype, "cpu")
    assert not predicted.rough
    spared = sum(min(block.saved, block.spared) for block in predicted.blocks)
    assert predicted.plain + spared + sum(predicted.folded) == pytest.approx(kept(real, dtype, False), rel=0.1)
    if method is None:
        assert predicted.inputs == pytest.approx(kept(real, dtype, True), rel=0.1)


@pytest.mark.parametrize(("kind", "adapter"), [pair for pair in PAIRS if pair[0] in SAMPLE])
def test_prediction_matches_what_a_real_pass_keeps(kind: str, adapter: str) -> None:
    check(kind, adapter, torch.bfloat16)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.slow
def test_prediction_matches_for_every_adapter(adapter: str) -> None:
    check("qwen3", adapter, torch.float32)


def test_prediction_follows_what_trains() -> None:
    check("llama", "none", torch.bfloat16, {"kind": "frozen", "reach": 1})


@pytest.mark.slow
def test_prediction_matches_on_every_architecture() -> None:
    for number, (kind, adapter) in enumerate(PAIRS):
        check(kind, adapter, (torch.bfloat16, torch.float32)[number % 2])


def test_loop_over_tokens_is_measured_on_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, plan = tuned("mamba", "none")
    names = set(trained_tensors(whole, plan))
    model = as_trained(whole.to("meta"), names, names, torch.float32)
    exact = trace(model, 31, torch.float32, "cpu")
    monkeypatch.setattr(activations, "_PROBE", 5)
    monkeypatch.setattr(activations, "_CALLS_A_BLOCK", 60)
    extended = trace(model, 31, torch.float32, "cpu")
    assert extended.plain == pytest.approx(exact.plain, rel=0.02)
    assert extended.products.forward == pytest.approx(exact.products.forward, rel=0.02)


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_model_without_a_loop_is_measured_in_one_pass(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, plan = tuned("llama", adapter)
    names = set(trained_tensors(whole, plan))
    model = as_trained(whole.to("meta"), names, names, torch.bfloat16)
    passes: list[int] = []
    run = activations._run

    def counted(model: Any, tokens: int, *others: Any, **options: Any) -> Any:
        passes.append(tokens)
        return run(model, tokens, *others, **options)

    monkeypatch.setattr(activations, "_run", counted)
    trace(model, TOKENS, torch.bfloat16, "cpu")
    assert passes == [TOKENS]


def test_model_that_does_not_run_without_weights_is_judged_by_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, plan = tuned("llama", "none")
    names = set(trained_tensors(whole, plan))
    model = as_trained(whole.to("meta"), names, names, torch.float32)
    measured = trace(model, TOKENS, torch.float32, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(activations, "_run", lambda *_, **__: 1 / 0)
        rough = trace(model, TOKENS, torch.float32, "cpu")
    assert rough.rough
    assert 0.5 < rough.plain / measured.plain < 2
    assert rough.products.forward == pytest.approx(measured.products.forward, rel=0.3)  # it leaves out attention
