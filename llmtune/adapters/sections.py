"""Adapters as a recipe writes them: what the parameters are."""

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtune.adapters.default_rates import bottleneck_rate, full_rate, ia3_rate, lora_rate
from llmtune.errors import PlanError
from llmtune.fields import Closed, Distances, Names, Positive
from llmtune.plan.stages import Facts


class NoAdapter(Closed):
    """The model's own parameters are trained."""

    kind: Literal["none"] = "none"
    """No adapter."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate at the output where `share` of the blocks trains."""
        return full_rate(facts.parameters, share)


def _offline_start(value: object) -> object:
    reasons = {
        "eva": "eva starts from activations on the data",
        "corda": "corda starts from activations on the data",
        "lora_ga": "lora_ga starts from gradients on the data",
        "loftq": "loftq fits a quantized base, and a delta is loaded on the base as it was",
    }
    if value in reasons:
        raise ValueError(f"{reasons[str(value)]}, which llmtune does not do; the nearest valid is pissa")
    return value


class Lora(Closed):
    """Low-rank updates beside linear layers (Hu 2021)."""

    kind: Literal["lora"]
    """Low-rank adapter."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update; 16 is near the knee."""
    alpha: Positive = 32
    """Scale of the update; the rate that matters is lr x alpha."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Names = "all-linear"
    """Module names to adapt, or all-linear: every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dora: bool = False
    """Learn magnitude and direction apart (DoRA)."""
    init: Annotated[Literal["default", "gaussian", "orthogonal", "pissa", "olora"], BeforeValidator(_offline_start)] = (
        "default"
    )
    """How A and B start; pissa and olora start from the weights, and the delta still fits the base as it was."""
    layers: Literal["all", "top", "middle", "bottom"] | Distances = "all"
    """The blocks that are adapted: a third of them, or a list of distances (1: the last block)."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Other ranks for some layers, by name or regular expression; the first that matches counts."""
    alphas: dict[str, Positive] = {}
    """Other alphas for some layers, by name or regular expression; the first that matches counts."""

    @model_validator(mode="after")
    def _even_where_orthogonal(self) -> Self:
        odd = [rank for rank in (self.rank, *self.ranks.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise PlanError("rank", f"orthogonal needs even ranks, not {odd[0]}; the nearest valid is {odd[0] + 1}")
        return self

    @property
    def effective_alpha(self) -> float:
        """The alpha of a plain LoRA of the same rank with the same scale."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate for the model's size at this alpha and initialisation."""
        return lora_rate(facts.parameters, self.effective_alpha, self.init)


class Ia3(Closed):
    """Learned rescaling of keys, values and feed-forward activations (Liu 2022)."""

    kind: Literal["ia3"]
    """Rescaling vectors."""
    targets: Literal["auto"] | Names = "auto"
    """Module names to rescale, or auto: what PEFT knows of the architecture."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate for the model's size."""
        return ia3_rate(facts.parameters)


class Bottleneck(Closed):
    """A narrow MLP beside or behind each block's own (Houlsby 2019, He 2021)."""

    kind: Literal["bottleneck"]
    """Bottleneck adapter."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Width; hidden size / 16 where not given."""
    form: Literal["parallel", "sequential"] = "parallel"
    """parallel: the MLP's own form, merges exactly into a wider MLP; sequential: behind the MLP, cannot be merged."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate for the model's size."""
        return bottleneck_rate(facts.parameters)


def _spelt(value: object) -> object:
    return {"kind": "none"} if value in (None, "none") else value


AnyAdapter = NoAdapter | Lora | Ia3 | Bottleneck
_ByKind = Annotated[AnyAdapter, Field(discriminator="kind")]
Adapter = Annotated[_ByKind, BeforeValidator(_spelt, json_schema_input_type=_ByKind | Literal["none"] | None)]


def rate_notes(adapter: AnyAdapter, lr: float) -> list[str]:
    """What a run's header says of its rate: the rate at alpha 32, and a warning where runs are known to diverge."""
    if not isinstance(adapter, Lora):
        return []
    at_32 = lr * adapter.effective_alpha / 32
    notes = [f"lr_at_alpha_32 {at_32:.2g}"]
    if at_32 >= 3e-3:
        notes.append("warning: runs at lr_at_alpha_32 >= 3e-3 are known to diverge; 3e-4 to 1e-3 is the usual range")
    elif not 1e-4 <= at_32 <= 1e-3 * 1.05:
        notes.append("warning: lr_at_alpha_32 is outside 1e-4..1e-3, where published optima lie")
    return notes
