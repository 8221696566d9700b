"""LoRA and its variants: low-rank updates beside linear layers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmtune.adapters import lora_join
from llmtune.adapters.base import AdapterSpec, rate_by_size
from llmtune.errors import FieldError, PlanError
from llmtune.fields import Distances, Names, Pattern, Positive, Width
from llmtune.numbers import rate
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_RATES = (2e-3, 5e-4, 3e-4, 2e-4)
"""At alpha 32."""
_FACTORS = {"pissa": 1 / 10, "olora": 1 / 18}
"""Starts that take weight out of the base, and how much lower their rate is."""
_FEW, _MANY = 100, 50_000
"""Rows under which a low rank is enough, and from which a high one is."""


def _refuse_data_starts(value: object) -> object:
    """Raise ValueError for a start that PEFT has and llmtune has not."""
    reasons = {
        "eva": "eva starts from activations on the data",
        "corda": "corda starts from activations on the data",
        "lora_ga": "lora_ga starts from gradients on the data",
        "loftq": "loftq fits a quantized base, and a delta is loaded on the base as it was",
    }
    if isinstance(value, str) and value in reasons:
        raise ValueError(f"{reasons[value]}, which llmtune does not do; try pissa")
    return value


class Lora(AdapterSpec):
    """Low-rank updates beside linear layers (Hu 2021)."""

    name: ClassVar[str] = "LoRA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "rslora": "use_rslora",
        "dora": "use_dora",
        "ranks": "rank_pattern",
        "alphas": "alpha_pattern",
    }
    joined_by: ClassVar[tuple[str, ...]] = (*lora_join.JOINED_BY,)
    served_beside_base: ClassVar[bool] = True

    kind: Literal["lora"]
    """Low-rank adapter."""
    rank: Width = 16
    """Rank of the update; 16 is near the knee."""
    alpha: Positive = 32
    """Scale of the update; the rate that matters is lr x alpha."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Names = "all-linear"
    """Module names to adapt, or all-linear: every linear layer inside the blocks, experts too, but no router."""
    experts: bool = True
    """Adapt experts that a model keeps as one tensor; false leaves them, whatever targets says."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dora: bool = False
    """Learn magnitude and direction apart (DoRA)."""
    init: Annotated[
        Literal["default", "gaussian", "orthogonal", "pissa", "olora"], BeforeValidator(_refuse_data_starts)
    ] = "default"
    """How A and B start; pissa and olora start from the weights, and the delta still fits the base as it was."""
    layers: Literal["all", "top", "middle", "bottom"] | Distances = "all"
    """The blocks that are adapted: a third of them, or a list of distances (1: the last block)."""
    ranks: dict[Pattern, Width] = {}
    """Other ranks for some layers, by name or regular expression; the first that matches counts."""
    alphas: dict[Pattern, Positive] = {}
    """Other alphas for some layers, by name or regular expression; the first that matches counts."""

    @model_validator(mode="after")
    def _even_where_orthogonal(self) -> Self:
        odd = [rank for rank in (self.rank, *self.ranks.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise PlanError("rank", f"orthogonal needs even ranks, not {odd[0]}; try {odd[0] + 1}")
        return self

    @property
    def title(self) -> str:
        """What people call it: LoRA, DoRA, rsLoRA, PiSSA or OLoRA, with the rank."""
        by_start = {"pissa": "PiSSA", "olora": "OLoRA"}.get(self.init, "rsLoRA" if self.rslora else self.name)
        return f"{'DoRA' if self.dora else by_start} (rank {self.rank})"

    @property
    def tags(self) -> list[str]:
        """The words by which people search the Hub for it: lora, and dora."""
        return ["lora", *(["dora"] if self.dora else [])]

    @classmethod
    def why(cls, rows: int) -> str:
        """One sentence on the rank for so many rows."""
        if rows < _FEW:
            return "LoRA of a low rank: under 100 rows teach form and style; try examples in the prompt first."
        if rows < _MANY:
            return "LoRA: up to some 50,000 rows it learns as much as full training and forgets less."
        return "LoRA of a high rank for many rows; --method full is the choice for wholly new knowledge."

    @classmethod
    def example(cls, rows: int) -> tuple[tuple[str, str], ...]:
        """The rank for so many rows, and alpha."""
        rank = 8 if rows < _FEW else 16 if rows < _MANY else 64
        return (f"rank: {rank}", "on all linear layers"), ("alpha: 32", "the scale of the update")

    @property
    def takes_all(self) -> bool:
        """Whether `targets` asks for every linear layer."""
        return self.targets == "all-linear"

    @property
    def effective_alpha(self) -> float:
        """The alpha of a plain LoRA of the same rank with the same scale."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    @property
    def no_tensors(self) -> FieldError | None:
        """Why PEFT cannot adapt experts that are one tensor, at the key that decides it; None where it can."""
        starts = {"pissa", "olora", "orthogonal"}
        reasons = {
            "dropout": "dropout acts on the input of a layer" if self.dropout else "",
            "dora": "DoRA has magnitudes for layers" if self.dora else "",
            "init": f"{self.init} is made for layers" if self.init in starts else "",
        }
        for key, reason in reasons.items():
            if reason:
                message = f"{reason}, and this model keeps its experts as one tensor"
                return FieldError(f"method.adapter.{key}", f"{message}; experts: false leaves them as they are")
        return None

    @property
    def takes_weight(self) -> bool:
        """Whether A and B start with a part of the base weights, which the base then lacks."""
        return self.init in _FACTORS

    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the rate for the model's size at this alpha and start."""
        return rate_by_size(facts.parameters, _RATES, 32 / self.effective_alpha * _FACTORS.get(self.init, 1.0))

    def rate_at_32(self, lr: float) -> float:
        """Return the rate that takes the same steps at alpha 32."""
        return lr * self.effective_alpha / 32

    def rate_notes(self, lr: float) -> list[str]:
        """Return the rate at alpha 32, and a warning where runs are known to diverge."""
        at_32 = self.rate_at_32(lr)
        notes = [f"learning rate at alpha 32: {rate(at_32)}"]
        if at_32 >= 3e-3:
            notes.append("warning: LoRA is known to diverge at 3e-3 or more; try 3e-4 to 2e-3 at alpha 32")
        elif not 1e-4 <= at_32 <= 2e-3 * 1.05:
            notes.append("warning: published optima lie between 1e-4 and 1e-3 at alpha 32, and at 2e-3 for 135M")
        return notes

    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> "LoraConfig":
        """Return PEFT's configuration; raises FieldError for a pattern, distance or rank that the model has not."""
        from peft import LoraConfig

        from llmtune.adapters.targets.lora import check_patterns, check_ranks, distances_of, lora_targets, with_weights
        from llmtune.model.blocks import blocks

        targets, tensors = lora_targets(self, model, plan, distances_of(self.layers, len(blocks(model))))
        check_patterns(self, [*targets, *tensors])
        if self.takes_weight:
            check_ranks(self, model, targets)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            target_parameters=tensors or None,
            rank_pattern=with_weights(self.ranks, tensors),
            alpha_pattern=with_weights(self.alphas, tensors),
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=self.init if self.init in ("gaussian", "orthogonal") else True,
        )

    @property
    def unquantizable(self) -> FieldError | None:
        """Why a start that takes weight out of the base does not fit a quantized one."""
        if not self.takes_weight:
            return None
        return FieldError(
            "method.adapter.init", "takes weight out of the base, which is rounded to few bits; try default"
        )

    def move_weight(self, tuned: "nn.Module", folder: Path, resumes: bool, device: "torch.device | str") -> None:
        """Move the start's share of the base weights into A and B, and keep it in `folder` for a resumed run."""
        if self.takes_weight:
            from llmtune.adapters.lora_starts import move_weight

            move_weight(tuned, self.init, folder, resumes, device)

    @classmethod
    def rebase(cls, tuned: "PeftModel", file: Path) -> None:
        """Rewrite a saved adapter with twice the rank and its start subtracted, so that it fits the original base."""
        from llmtune.adapters.lora_starts import rebase_on_original

        rebase_on_original(tuned, file)

    @classmethod
    def unjoinable(cls, stored: Mapping[str, Any], how: str) -> str | None:
        """Why PEFT cannot join it with others: DoRA, tensors of experts, new tokens."""
        return super().unjoinable(stored, how) or lora_join.unjoinable(stored)

    @classmethod
    def join(cls, tuned: "PeftModel", weights: Mapping[str, float], name: str, how: str, density: float | None) -> None:
        """Concatenate A and B, or join them by TIES or DARE."""
        lora_join.join(tuned, weights, name, how, density)

    def joined(self, rank: int | None) -> Self:
        """Return a LoRA of the combination's rank, whose A and B hold all scales."""
        changed: dict[str, Any] = {"rank": rank, "alpha": float(rank or 0), "ranks": {}, "alphas": {}, "rslora": False}
        return self.model_copy(update={**changed, "init": "default"})

    def count_stored(self, tuned: "nn.Module", tensors: "dict[str, nn.Parameter]") -> int:
        """Return the size of what trains, with A and B twice where their start is stored too."""
        start = [p for name, p in tensors.items() if self.takes_weight and (".lora_A." in name or ".lora_B." in name)]
        return super().count_stored(tuned, tensors) + sum(tensor.numel() for tensor in start)

    def match_precision(self, tuned: "nn.Module", dtype: "torch.dtype") -> None:
        """Cast A and B to the base's dtype, which is faster; DoRA's magnitudes stay in fp32, which bf16 would round."""
        from peft.tuners.lora import LoraLayer

        for module in tuned.modules():
            if isinstance(module, LoraLayer):
                module.lora_A.to(dtype)
                module.lora_B.to(dtype)
