"""Trained tensors of several runs as one set, by what PEFT does with the differences to the base."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, task_arithmetic, ties
from safetensors import safe_open
from transformers import PreTrainedModel

from llmtune.adapters.delta import TENSORS, load_delta, save_delta
from llmtune.combining.parts import Part
from llmtune.combining.proof import Measured
from llmtune.combining.request import Request
from llmtune.errors import ProofError
from llmtune.merging.adding import Ids, fp32_logits, load_compact
from llmtune.merging.compact import in_fp32
from llmtune.merging.proof import logits
from llmtune.model.base import Base
from llmtune.working import working


class Differences:
    """What each run added to the base's tensors; 0 where it did not train one."""

    def __init__(self, parts: Sequence[Part], files: Sequence[Any]) -> None:
        self._files = [(part.weight, file, set(file.keys())) for part, file in zip(parts, files, strict=True)]
        self.names = sorted(set().union(*(names for _, _, names in self._files)))

    def of(self, name: str, base: torch.Tensor) -> list[torch.Tensor]:
        """The differences of a tensor, in the base's dtype, one for each run in their order."""
        return [
            file.get_tensor(name).to(base.dtype) - base if name in names else torch.zeros_like(base)
            for _, file, names in self._files
        ]

    def add_to(self, name: str, tensor: torch.Tensor) -> None:
        """Add the weighted sum of the differences to the base's tensor, in fp64."""
        base = tensor.double()
        pairs = zip(self._files, self.of(name, base), strict=True)
        tensor.copy_(base + sum(weight * difference for (weight, _, _), difference in pairs))


def join_tensors(
    base: Base, parts: Sequence[Part], request: Request, folder: Path, ids: Ids, combined: dict[str, Any]
) -> Measured:
    """Write the tensors that several runs make to a delta's folder, and compute the logits that prove them.

    `combined` are the facts that go into the delta.
    """
    with working("loading the base model"):
        weights, untuned = load_compact(base, ids)
    with _differences(parts) as differences:
        tensors = _join(weights, differences, request)
        with working("computing the live combination"):
            live = _live_logits(weights, differences, tensors if request.how != "linear" else None, ids)
    with working("writing the combined tensors"):
        save_delta(weights, tensors, folder, base, "none", combined=combined)
    del tensors
    with working("comparing with the live combination"):
        stored = fp32_logits(load_delta(weights, folder, as_stored=True), ids)
    return Measured(untuned, live, stored)


@contextlib.contextmanager
def _differences(parts: Sequence[Part]) -> Iterator[Differences]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(part.run.delta / TENSORS, framework="pt")) for part in parts]
        yield Differences(parts, files)


@torch.no_grad()
def _join(weights: PreTrainedModel, differences: Differences, request: Request) -> dict[str, torch.Tensor]:
    """The combined tensors in fp32; raises ProofError for one that the base does not have, or has in another shape."""
    parameters, shares = dict(weights.named_parameters()), torch.tensor(request.weights)
    tensors = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # at density 1 nothing is dropped
        torch.manual_seed(request.seed or 0)
        with working("joining the tensors", len(differences.names), "tensors") as step:
            for name in differences.names:
                if name not in parameters:
                    raise ProofError(f"{name} was trained, and the base does not have it: another base")
                start = parameters[name].detach().float()
                tensors[name] = start + _joined(differences.of(name, start), shares, request)
                step()
    return tensors


def _joined(differences: list[torch.Tensor], weights: torch.Tensor, request: Request) -> torch.Tensor:
    """What PEFT makes of the differences of one tensor."""
    if request.density is None:
        joined = task_arithmetic(differences, weights)
    else:
        joined = (ties if request.how == "ties" else dare_linear)(differences, weights, request.density)
    return torch.as_tensor(joined)


def _live_logits(
    weights: PreTrainedModel, differences: Differences, tensors: dict[str, torch.Tensor] | None, ids: Ids
) -> torch.Tensor:
    """Logits in fp32 of the base with the weighted sum of the differences, or with these tensors."""
    numbers = [name for name, _ in weights.named_parameters()]

    def change(number: int, parameter: torch.Tensor) -> None:
        name = numbers[number]
        if tensors is None and name in differences.names:
            differences.add_to(name, parameter)
        elif tensors is not None and name in tensors:
            parameter.copy_(tensors[name])

    with torch.no_grad(), in_fp32(weights, change):
        return logits(weights, ids)
