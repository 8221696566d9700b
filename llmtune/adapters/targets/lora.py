"""What LoRA goes to: layers by their names, and by the names of their tensors experts and what PEFT takes for them."""

import math
from collections.abc import Mapping
from typing import Protocol

from peft.utils.other import get_pattern_key
from torch import nn

from llmtune.adapters.targets.choose import choose_targets
from llmtune.adapters.targets.experts import expert_tensors
from llmtune.errors import FieldError, nearest
from llmtune.model.mlp import features
from llmtune.plan.stages import Plan


class Wanted(Protocol):
    """What a recipe says of a LoRA."""

    @property
    def targets(self) -> str | tuple[str, ...]:
        """Names of layers, or all-linear."""

    @property
    def experts(self) -> bool:
        """Whether experts that are one tensor are adapted."""

    @property
    def no_tensors(self) -> FieldError | None:
        """Why PEFT cannot adapt tensors."""

    @property
    def rank(self) -> int:
        """The rank of most layers."""

    @property
    def init(self) -> str:
        """How A and B start."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Other ranks by pattern."""

    @property
    def alphas(self) -> Mapping[str, float]:
        """Other alphas by pattern."""


def distances_of(layers: str | tuple[int, ...], count: int) -> set[int]:
    """Return the distances of the blocks that `method.adapter.layers` means in a model of `count` blocks."""
    if isinstance(layers, tuple):
        if beyond := [distance for distance in layers if distance > count]:
            reason = f"distance {beyond[0]} is beyond the model, which has {count} blocks; try {count}"
            raise FieldError("method.adapter.layers", reason)
        return set(layers)
    third = math.ceil(count / 3)
    top, bottom = set(range(1, third + 1)), set(range(count - third + 1, count + 1))
    everything = set(range(1, count + 1))
    parts = {"all": everything, "top": top, "bottom": bottom, "middle": everything - top - bottom or everything}
    return parts[layers]


def lora_targets(spec: Wanted, model: nn.Module, plan: Plan, near: set[int]) -> tuple[list[str], list[str]]:
    """Return the names of the layers to adapt, and of the tensors, in blocks at the distances `near`.

    Raises FieldError where PEFT cannot adapt tensors of experts in this way.
    """
    experts = expert_tensors(model)
    names = choose_targets(model, plan, spec.targets, near, tensors=True)
    if spec.no_tensors:
        if spec.experts and any(name in experts for name in names):
            raise spec.no_tensors
        names = choose_targets(model, plan, spec.targets, near)
    if not spec.experts:
        names = [name for name in names if name not in experts]
    if not names:
        raise FieldError("method.adapter.experts", "false leaves nothing to adapt of method.adapter.targets; try true")
    tensors = dict(model.named_parameters()).keys() & set(names)
    return [name for name in names if name not in tensors], [name for name in names if name in tensors]


def with_weights(patterns: Mapping[str, float], tensors: list[str]) -> dict[str, float]:
    """Return patterns of layers with one for the weight of each layer that is adapted by its tensor."""
    if not any(name.endswith(".weight") for name in tensors):
        return dict(patterns)
    both = [(pattern, f"({pattern})[.]weight") for pattern in patterns]
    return {each: patterns[pair[0]] for pair in both for each in pair}


def check_patterns(spec: Wanted, targets: list[str]) -> None:
    """Raise FieldError for a pattern of `ranks` or `alphas` that matches no target."""
    names = [name.removesuffix(".weight") for name in targets]
    for key, patterns in (("ranks", spec.ranks), ("alphas", spec.alphas)):
        for pattern in patterns:
            if not any(get_pattern_key([pattern], name) == pattern for name in names):
                hint = nearest(pattern, sorted({name.rsplit(".", 1)[-1] for name in names}))
                raise FieldError(f"method.adapter.{key}", f"{pattern!r} matches none of the adapted layers{hint}")


def check_ranks(spec: Wanted, model: nn.Module, targets: list[str]) -> None:
    """Raise FieldError for a rank above what a layer's weight has."""
    for name in targets:
        most = min(features(model.get_submodule(name)))
        rank = spec.ranks.get(get_pattern_key(list(spec.ranks), name), spec.rank)
        if rank > most:
            reason = f"{spec.init} takes at most rank {most} from {name}, not {rank}; try {most}"
            raise FieldError("method.adapter.rank", reason)
