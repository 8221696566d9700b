"""VeRA: one pair of random matrices for all layers, and two trained vectors a layer."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.adapters.base import AdapterSpec, rate_by_size
from llmtune.fields import Names, Positive, Width
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    from peft import PeftModel, VeraConfig
    from torch import nn
    from transformers import PreTrainedModel

_RATES = (1e-2, 5e-3, 3e-3, 2e-3)


class Vera(AdapterSpec):
    """Vectors that scale one frozen random low-rank update, shared by all layers (Kopiczko 2024)."""

    name: ClassVar[str] = "VeRA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "d_initial": "d_initial",
        "projection_seed": "projection_prng_key",
    }

    kind: Literal["vera"]
    """Vector-based random matrix adaptation."""
    rank: Width = 256
    """Rank of the random matrices; larger than LoRA's, since only a vector of this length trains."""
    targets: Literal["all-linear"] | Names = "all-linear"
    """Module names to adapt, or all-linear: every linear layer but the head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    d_initial: Positive = 0.1
    """Start of the vector between the matrices; the paper advises 0.1 or less."""
    projection_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random matrices, which the delta keeps."""

    @property
    def takes_all(self) -> bool:
        """Whether `targets` asks for every linear layer."""
        return self.targets == "all-linear"

    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the rate for the model's size: ten times LoRA's, as in the paper's instruction tuning."""
        return rate_by_size(facts.parameters, _RATES)

    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> "VeraConfig":
        """Return PEFT's configuration; the random matrices are as large as the largest layer needs."""
        from peft import VeraConfig
        from transformers.pytorch_utils import Conv1D

        from llmtune.adapters.targets.choose import choose_targets

        targets = choose_targets(model, plan, self.targets)
        return VeraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            target_modules=targets,
            vera_dropout=self.dropout,
            d_initial=self.d_initial,
            projection_prng_key=self.projection_seed,
            # On a bf16 base PEFT rounds the matrices, so the seed alone does not give them back on an fp32 base.
            save_projection=True,
            fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        )

    def count_stored(self, tuned: "PeftModel", tensors: "dict[str, nn.Parameter]") -> int:
        """Return the size of the trained vectors and of the two random matrices."""
        matrices = (tuned.base_model.vera_A, tuned.base_model.vera_B)
        return super().count_stored(tuned, tensors) + sum(each["default"].numel() for each in matrices)
