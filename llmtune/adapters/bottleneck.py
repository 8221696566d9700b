"""Bottleneck adapters: a narrow MLP beside or behind each block's own."""

from typing import TYPE_CHECKING, ClassVar, Literal

from llmtune.adapters.base import AdapterSpec, rate_by_size
from llmtune.errors import FieldError
from llmtune.fields import Width
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmtune.adapters.bottleneck_layers import BottleneckConfig

_RATES = (1e-3, 5e-4, 3e-4, 1e-4)
UNMERGEABLE = (
    "a sequential bottleneck cannot be merged: train with form: parallel, "
    "or set merge.enabled: false and publish the delta"
)


class Bottleneck(AdapterSpec):
    """A narrow MLP beside or behind each block's own (Houlsby 2019, He 2021)."""

    name: ClassVar[str] = "bottleneck adapters"
    peft_names: ClassVar[dict[str, str]] = {"size": "size", "form": "form"}

    kind: Literal["bottleneck"]
    """Bottleneck adapter."""
    size: Width | None = None
    """Width; hidden size / 16 where not given."""
    form: Literal["parallel", "sequential"] = "parallel"
    """parallel: the MLP's own form, merges exactly into a wider MLP; sequential: behind the MLP, cannot be merged."""
    registered_by: ClassVar[str | None] = "llmtune.bottleneck"

    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the rate for the model's size."""
        return rate_by_size(facts.parameters, _RATES)

    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> "BottleneckConfig":
        """Return the configuration of llmtune's own PEFT method; raises FieldError where blocks have no plain MLP."""
        from llmtune.adapters.bottleneck_layers import BottleneckConfig
        from llmtune.adapters.targets.choose import choose_targets
        from llmtune.model.mlp import mlps, width_key

        trained = set(choose_targets(model, plan, "all-linear"))
        names = {id(module): name for name, module in model.named_modules()}
        try:
            all_mlps = mlps(model)
            if self.form == "parallel":
                width_key(model, all_mlps[0].width)
        except ValueError as error:
            raise FieldError("method.adapter.kind", str(error)) from error
        targets = [mlp.name for mlp in all_mlps if names[id(mlp.down)] in trained]
        size = self.size or max(1, model.config.get_text_config().hidden_size // 16)
        return BottleneckConfig(task_type="CAUSAL_LM", size=size, form=self.form, target_modules=targets)

    @property
    def unmergeable(self) -> FieldError | None:
        """Why a sequential bottleneck gives no full weights: no stock model has a layer behind the MLP."""
        return FieldError("method.adapter.form", UNMERGEABLE) if self.form == "sequential" else None
