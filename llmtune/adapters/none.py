"""No adapter: the model's own parameters train."""

from typing import TYPE_CHECKING, ClassVar, Literal

from llmtune.adapters.base import AdapterSpec, rate_by_size
from llmtune.plan.stages import Facts, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATES = (3e-4, 3e-5, 1e-5, 5e-6)


class NoAdapter(AdapterSpec):
    """The model's own parameters are trained."""

    name: ClassVar[str] = "no adapter"

    kind: Literal["none"] = "none"
    """No adapter."""
    trains_base: ClassVar[bool] = True
    joined_by: ClassVar[tuple[str, ...]] = ("linear", "ties", "dare")

    def default_rate(self, facts: Facts, share: float) -> float:
        """Return the rate where `share` of the blocks trains: ten times the full rate for the head alone."""
        return rate_by_size(facts.parameters, _RATES, 10 ** (1 - share))

    def peft_config(self, model: "PreTrainedModel", plan: Plan) -> None:
        """Return None: PEFT inserts nothing."""

    @property
    def tags(self) -> list[str]:
        """No words: there is no adapter."""
        return []
