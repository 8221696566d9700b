"""IA3: learned factors on keys, values and feed-forward activations."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtune.adapters.base import AdapterSpec, rate_by_size
from llmtune.errors import FieldError
from llmtune.fields import Names
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    from peft import IA3Config, PeftModel
    from transformers import PreTrainedModel

_RATES = (5e-3, 5e-3, 5e-3, 3e-3)


class Ia3(AdapterSpec):
    """Learned rescaling of keys, values and feed-forward activations (Liu 2022)."""

    name: ClassVar[str] = "IA3"
    joined_by: ClassVar[tuple[str, ...]] = ("linear",)

    kind: Literal["ia3"]
    """Rescaling vectors."""
    targets: Literal["auto"] | Names = "auto"
    """Module names to rescale, or auto: what PEFT knows of the architecture."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the rate for the model's size."""
        return rate_by_size(facts.parameters, _RATES)

    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> "IA3Config":
        """Return PEFT's configuration; factors on feed-forward layers apply to their input."""
        from peft import IA3Config
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

        from llmtune.adapters.targets.choose import choose_targets

        targets = choose_targets(model, plan, self._known_names(model) if self.targets == "auto" else self.targets)
        ends = tuple(FEEDFORWARD.get(model.config.model_type, ()))
        feedforward = [name for name in targets if name.endswith(ends)]
        return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)

    @classmethod
    def join(cls, tuned: "PeftModel", weights: Mapping[str, float], name: str, how: str, density: float | None) -> None:
        """Sum factors so that they stay at 1 for the share of the weights that no run has.

        A factor l changes its layer by l - 1; PEFT sums the factors, which is the same where all weights sum to 1.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuned.base_model.add_weighted_adapter([*weights], [*weights.values()], name)
        for layer in (module for module in tuned.modules() if isinstance(module, BaseTunerLayer)):
            factors: Any = layer.ia3_l
            factors[name].data += 1 - sum(weight for one, weight in weights.items() if one in factors)

    @staticmethod
    def _known_names(model: "PreTrainedModel") -> tuple[str, ...]:
        """Return the names that PEFT knows for the model's type; raises FieldError where the model lacks one."""
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

        from llmtune.adapters.targets.choose import linear_names

        kind = model.config.model_type
        if kind not in KNOWN:
            raise FieldError("method.adapter.targets", f"PEFT knows no IA3 targets for {kind}; list module names")
        names = linear_names(model)
        missing = [name for name in KNOWN[kind] if name.rsplit(".", 1)[-1] not in names]
        if missing:
            lacks = f"auto means {', '.join(KNOWN[kind])} for {kind}, and this model has no linear layer {missing[0]}"
            raise FieldError("method.adapter.targets", f"{lacks}; list module names: {', '.join(names)}")
        return tuple(KNOWN[kind])
