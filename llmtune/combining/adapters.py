"""Several adapters of one base as one, by PEFT: LoRA's and IA3's."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from llmtune.adapters.delta import ADAPTER, check_loaded, load_delta, save_delta
from llmtune.combining.parts import Part
from llmtune.combining.proof import Measured
from llmtune.combining.request import Request
from llmtune.merging.adding import Ids, fp32_logits, load_compact, refuse_tied
from llmtune.merging.compact import in_fp32, widened_units
from llmtune.merging.proof import logits
from llmtune.model.base import Base, build_skeleton
from llmtune.working import working

JOINED = "default"
"""The name that PEFT gives to an adapter that is alone."""


def join_adapters(
    base: Base, parts: Sequence[Part], request: Request, folder: Path, ids: Ids, combined: dict[str, Any]
) -> Measured:
    """Write the adapter that several make to a delta's folder, and compute the logits that prove it.

    `combined` are the facts that go into the delta.
    """
    with working("joining the adapters"):
        tuned = _loaded(_without_weights(base), parts)
        _join(tuned, parts, request)
        tensors = {name: tensor for name, tensor in tuned.state_dict().items() if f".{JOINED}" in name}
        save_delta(tuned, tensors, folder, base, str(parts[0].base["adapter"]), combined=combined)
    with working("loading the base model"):
        weights, untuned = load_compact(base, ids)
    with working("comparing with the live combination"):
        return Measured(untuned, *_live_and_stored(weights, parts, request, folder, ids))


def _live_and_stored(
    weights: PreTrainedModel, parts: Sequence[Part], request: Request, folder: Path, ids: Ids
) -> tuple[torch.Tensor, torch.Tensor]:
    tuned = _loaded(weights, parts)
    refuse_tied(tuned)
    if request.how == "linear":
        live = _summed_logits(tuned, parts, ids)
    else:
        _join(tuned, parts, request)
        live = fp32_logits(tuned, ids)
    untuned = tuned.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sees that this model had adapters before
        return live, fp32_logits(load_delta(untuned, folder, as_stored=True), ids)


def _without_weights(base: Base) -> PreTrainedModel:
    """The model in fp32 with a single number behind each weight: adapters are joined beside it, not in it."""
    skeleton = build_skeleton(base)
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return skeleton


def _loaded(model: PreTrainedModel, parts: Sequence[Part]) -> PeftModel:
    """The model with every run's adapter in it, each under the name of its place; raises ProofError for a misfit."""
    device = str(model.device)
    tuned = PeftModel.from_pretrained(model, str(parts[0].run.delta), adapter_name=_name(0), torch_device=device)
    for place, part in enumerate(parts):
        if place:
            tuned.load_adapter(str(part.run.delta), adapter_name=_name(place), torch_device=device)
        check_loaded(tuned, part.run.delta / ADAPTER, _name(place))
    return tuned.eval()


def _name(place: int) -> str:
    return f"run{place}"


@torch.no_grad()
def _join(tuned: PeftModel, parts: Sequence[Part], request: Request) -> None:
    """Put what the loaded adapters make in their place; the same at every call."""
    weights = {_name(place): part.weight for place, part in enumerate(parts)}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # at density 1 nothing is dropped
        torch.manual_seed(request.seed or 0)
        parts[0].adapter.join(tuned, weights, JOINED, request.how, request.density)
        tuned.set_adapter(JOINED)
        for name in weights:
            tuned.delete_adapter(name)


def _summed_logits(tuned: PeftModel, parts: Sequence[Part], ids: Ids) -> torch.Tensor:
    """Logits in fp32 of the base's weights plus the weighted sum of what each adapter alone adds to them."""
    weights = {_name(place): part.weight for place, part in enumerate(parts)}
    with in_fp32(tuned), _summed_units(tuned, weights), tuned.disable_adapter():
        return logits(tuned, ids)


@contextlib.contextmanager
def _summed_units(tuned: PeftModel, weights: dict[str, float]) -> Iterator[None]:
    """Sum the adapters into each unit before it runs; `in_fp32`, around this, puts the weights back."""

    def add(unit: nn.Module) -> None:
        for layer in (module for module in unit.modules() if isinstance(module, BaseTunerLayer)):
            _sum_into(layer, weights)

    with widened_units(tuned, add, lambda unit: None):
        yield


@torch.no_grad()
def _sum_into(layer: BaseTunerLayer, weights: dict[str, float]) -> None:
    """Give a layer's base new weights, in fp64 until they are summed: its own, and what each merge alone adds."""
    parameters = list(layer.get_base_layer().parameters())
    before = [parameter.data.double() for parameter in parameters]
    totals = [start.clone() for start in before]
    for name, weight in weights.items():
        for parameter, start in zip(parameters, before, strict=True):
            parameter.data = start.clone()
        layer.merge(adapter_names=[name])
        layer.merged_adapters.clear()
        for total, parameter, start in zip(totals, parameters, before, strict=True):
            total += weight * (parameter.data - start)
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.data = total.float()
