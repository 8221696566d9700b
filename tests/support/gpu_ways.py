"""The ways of a GPU on CPU tensors: the device question answered for one, its kernel replaced by one row at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from llmtune.adapters.insert import insert
from llmtune.kernels import device, varlen
from llmtune.kernels.attention import row_attention
from llmtune.kernels.install import install
from llmtune.model.base import model_facts
from llmtune.training.joining import joiner as joiner_module
from llmtune.training.joining.joiner import RowJoiner
from tests.support import architectures, training
from tests.support.training import BASE

LENGTHS = (11, 4, 7)
IDS = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(1))
FULL: dict[str, Any] = {"kind": "full", "lr": 0.01}
ADAPTERS: dict[str, Any] = {
    "none": "none",
    "lora": training.LORA,
    "dora": training.LORA | {"dora": True},
    "bottleneck": {"kind": "bottleneck", "size": 4},
}


def answer_for_gpu(monkeypatch: pytest.MonkeyPatch, kernel: Any = varlen.row_by_row) -> None:
    """Take the ways of GPUs from here on, with a kernel that runs on CPUs."""
    monkeypatch.setattr(device, "on_cpu", lambda device: False)
    monkeypatch.setattr(varlen, "kernel", lambda: kernel)


def share_weights(monkeypatch: pytest.MonkeyPatch, agree: bool) -> list[bool]:
    """Take weights as sharded over processes that agree with this one, or find all unequal; gives its own verdicts."""
    verdicts: list[bool] = []

    def gathered(equal: bool, device: torch.device) -> bool:
        verdicts.append(equal)
        return equal and agree

    monkeypatch.setattr(RowJoiner, "_is_sharded", lambda joiner: True)
    monkeypatch.setattr(joiner_module, "_in_all_processes", gathered)
    return verdicts


def arguments(**changes: bool) -> SimpleNamespace:
    """As much of a Trainer's arguments as `install` reads."""
    known = {"bf16": False, "fp16": False, "gradient_checkpointing": False, "world_size": 1}
    return SimpleNamespace(device=torch.device("cpu"), **known | changes)


def adapted(kind: str, adapter: str = "none", checkpointing: bool = False, **more: Any) -> Any:
    """A tiny model of an architecture in training, with an adapter whose output is not zero."""
    model = architectures.model(kind, **more)
    method = training.spec(FULL | {"adapter": ADAPTERS[adapter]}).method
    torch.manual_seed(0)
    model = insert(model, method.adapter, method.plan(model_facts(model)), BASE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bottleneck_down" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def joiner_of(model: PreTrainedModel, mixed: bool = False) -> Iterator[RowJoiner]:
    """The joiner of a model's rows while it trains."""
    joiner = RowJoiner(model, None, lambda: torch.autocast("cpu", torch.bfloat16, enabled=mixed))
    with row_attention() as joiner.router:
        yield joiner


def padded(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch of the first rows, of these lengths, padded to the longest."""
    ids = IDS[: len(lengths), : max(lengths)]
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}


def step(
    model: Any, ours: bool, mixed: bool = False, share: Callable[[Any], Any] = lambda model: model
) -> tuple[list[torch.Tensor], RowJoiner | None]:
    """The loss over all tokens of three rows and the gradients of what trains; with patches and joined rows if ours.

    `share` shares the weights among processes.
    """
    inputs = padded(LENGTHS)
    rows, columns = inputs["attention_mask"][:, 1:].nonzero(as_tuple=True)
    targets = IDS[rows, columns + 1]
    checkpointing = _checkpoints(model)
    pending = install(model, arguments(bf16=mixed, gradient_checkpointing=checkpointing)) if ours else None
    model = share(model)
    with joiner_of(model, mixed) if ours else nullcontext() as joiner:
        joined = None
        if joiner is not None:
            inputs, joined = joiner.prepare(inputs, None, LENGTHS)
        if joined is not None:
            rows, columns = torch.zeros_like(rows), joined.places(rows, columns)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[rows, columns].float(), targets)
        torch.autograd.backward(loss)
    if pending is not None:
        pending.flush()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return [loss.detach(), *gradients], joiner


def _checkpoints(model: Any) -> bool:
    return bool(model.is_gradient_checkpointing)


def gaps(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> tuple[float, float]:
    """How far the loss is from the plain one, and all gradients as one, relative."""
    assert len(ours) == len(plain)
    mine, other = (torch.cat([tensor.flatten().float() for tensor in results[1:]]) for results in (ours, plain))
    loss = abs(float(ours[0]) - float(plain[0])) / abs(float(plain[0]))
    return loss, float((mine - other).norm() / other.norm())


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute, without those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.name.startswith("aten::new_empty"):
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))
