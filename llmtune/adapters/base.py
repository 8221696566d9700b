"""What llmtune asks of an adapter: one class a kind, which is a recipe section too. Importing it loads no torch."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmtune.errors import FieldError
from llmtune.fields import Closed
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_SIZES = (135e6, 1e9, 8e9, 70e9)


class AdapterSpec(Closed):
    """What the parameters are; a new kind of adapter is a file with a subclass, and a line in `kinds.py`."""

    kind: str
    trains_base: ClassVar[bool] = False
    name: ClassVar[str]
    """What people call it."""
    registered_by: ClassVar[str | None] = None
    """The module to import before PEFT can load this adapter; None for what PEFT itself has."""
    peft_names: ClassVar[dict[str, str]] = {}
    """The settings that PEFT's configuration keeps, and their names there."""
    joined_by: ClassVar[tuple[str, ...]] = ()
    """The ways in which `llmtune combine` joins its deltas, of linear, ties and dare."""
    served_beside_base: ClassVar[bool] = False
    """Whether vLLM takes it as an adapter beside its base."""

    @abstractmethod
    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the learning rate at the output where `share` of the blocks trains."""

    @abstractmethod
    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> "PeftConfig | None":
        """Return PEFT's configuration for the layers that the plan ever trains; raises FieldError for a bad target."""

    @property
    def title(self) -> str:
        """What people call it, with its rank where it has one: LoRA (rank 16)."""
        rank = getattr(self, "rank", None)
        return f"{self.name} (rank {rank})" if rank else self.name

    @property
    def takes_weight(self) -> bool:
        """Whether it starts with a part of the base's weights, which the base then lacks."""
        return False

    @property
    def tags(self) -> list[str]:
        """The words by which people search the Hub for it."""
        return [self.kind]

    @classmethod
    def why(cls, rows: int) -> str:
        """One sentence for a recipe that `llmtune init` writes for so many rows."""
        return f"{cls.name}: {str(cls.__doc__).splitlines()[0]}"

    @classmethod
    def example(cls, rows: int) -> tuple[tuple[str, str], ...]:
        """Lines of such a recipe's `method` section at good values, each with its comment."""
        return ()

    def rate_notes(self, lr: float) -> list[str]:
        """Return what the plan says of a learning rate, warnings included."""
        return []

    def rate_at_32(self, lr: float) -> float | None:
        """Return the rate that a LoRA of alpha 32 has where this one has `lr`; None for what is no LoRA."""
        return None

    @property
    def takes_all(self) -> bool:
        """Whether every linear layer inside the blocks was asked for, so that a plan says which ones are left."""
        return False

    @property
    def unmergeable(self) -> FieldError | None:
        """Why no full weights can be written from it, at the key that decides it; None where they can."""
        return None

    @property
    def unquantizable(self) -> FieldError | None:
        """Why it cannot train on a base in 4 or 8 bits, at the key that decides it; None where it can."""
        return None

    def move_weight(self, tuned: "nn.Module", folder: Path, resumes: bool, device: "torch.device | str") -> None:
        """Move the adapter's share of the base weights into it, the same as before on a resumed run.

        `folder` keeps the start between runs. Most kinds take no weight and do nothing.
        """

    @classmethod
    def rebase(cls, tuned: "PeftModel", file: Path) -> None:
        """Rewrite a saved adapter that took weight from the base so that it fits the original base."""

    def continued(self, kind: str, stored: Mapping[str, Any], targets: list[str], name: str) -> Self:
        """Return the adapter with what it leaves open as it is in a stored one, which goes on training.

        `stored` is PEFT's configuration of the one called `name`, `targets` are its layers. Raises FieldError where
        the two contradict.
        """
        if kind != self.kind:
            message = f"{name} is an adapter of the kind {kind}, not {self.kind}; write adapter: {kind}"
            raise FieldError("method.adapter", message)
        if self.takes_weight:
            message = f"takes weight out of the base, and {name} has values of its own; remove it"
            raise FieldError("method.adapter.init", message)
        taken = {key: stored[theirs] for key, theirs in self.peft_names.items() if theirs in stored}
        for key in self.model_fields_set & set(taken):
            if getattr(self, key) != taken[key]:
                message = f"{getattr(self, key)!r} contradicts {name}, which was trained with {taken[key]!r}"
                raise FieldError(f"method.adapter.{key}", f"{message}; write that, or remove the key")
        if "targets" in type(self).model_fields and not {"targets", "layers"} & self.model_fields_set:
            taken["targets"] = targets
        return type(self).model_validate({**taken, **self.model_dump(exclude_unset=True)})

    def count_stored(self, tuned: "nn.Module", tensors: "dict[str, nn.Parameter]") -> int:
        """Return how many numbers the delta holds; `tensors` are those that train."""
        return sum(tensor.numel() for tensor in tensors.values())

    @classmethod
    def unjoinable(cls, stored: Mapping[str, Any], how: str) -> str | None:
        """Why a trained one cannot be joined with others, in words; None where it can.

        `stored` is PEFT's configuration of it, empty where PEFT inserts nothing.
        """
        if not cls.joined_by:
            return f"deltas of {cls.name} do not add up to one; those of LoRA, IA3 and trained tensors do"
        if how not in cls.joined_by:
            return f"PEFT has no {how} for {cls.name}; try --how {cls.joined_by[0]}"
        return None

    @classmethod
    def join(cls, tuned: "PeftModel", weights: Mapping[str, float], name: str, how: str, density: float | None) -> None:
        """Put the combination of a model's adapters, each with its weight, into it as one called `name`.

        Raises NotImplementedError for a kind that `joined_by` gives no way for.
        """
        raise NotImplementedError(f"{cls.name} has no way to join adapters")

    def joined(self, rank: int | None) -> Self:
        """Return the settings that a combination has whose first run has these; `rank` is the combination's."""
        return self

    def match_precision(self, tuned: "nn.Module", dtype: "torch.dtype") -> None:
        """Cast what training multiplied in the base's `dtype` to it, for evaluation."""


def rate_by_size(parameters: int, rates: tuple[float, ...], factor: float = 1.0) -> float:
    """Return `factor` times the rate for a model of that many parameters, rounded to two digits.

    `rates` stand for 135M, 1B, 8B and 70B: interpolated in logarithms, flat outside.
    """
    position = math.log(min(max(parameters, _SIZES[0]), _SIZES[-1]))
    upper = next(index for index, size in enumerate(_SIZES[1:], 1) if position <= math.log(size) + 1e-12)
    low, high = math.log(_SIZES[upper - 1]), math.log(_SIZES[upper])
    share = (position - low) / (high - low)
    return float(f"{rates[upper - 1] ** (1 - share) * rates[upper] ** share * factor:.1e}")
