"""Several LoRAs of one base as one: what PEFT joins, and how."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel

JOINED_BY = {"linear": "cat", "ties": "ties", "dare": "dare_linear"}
"""PEFT's names. Its own `linear` sums A and B apart, whose product is not the sum of the products."""
_UNJOINABLE = {
    "use_dora": "DoRA's magnitudes do not add up; combine runs with dora: false",
    "target_parameters": "PEFT joins no adapters on experts that are one tensor; train with experts: false",
    "trainable_token_indices": "PEFT joins no adapters with new tokens; train them with adapter: none",
}
"""Settings of PEFT's that add what it cannot join."""


def unjoinable(stored: Mapping[str, Any]) -> str | None:
    """Why a LoRA with this configuration of PEFT's cannot be joined, in words; None where it can."""
    return next((reason for key, reason in _UNJOINABLE.items() if stored.get(key)), None)


def join(tuned: "PeftModel", weights: Mapping[str, float], name: str, how: str, density: float | None) -> None:
    """Put the combination of a model's LoRAs, each with its weight, into it as one called `name`."""
    first, *_ = weights
    # PEFT scales each adapter as it was trained, and gives the joined one the first's configuration.
    tuned.peft_config[first] = replace(tuned.peft_config[first], use_rslora=False, init_lora_weights=True)
    tuned.base_model.add_weighted_adapter(
        [*weights], [*weights.values()], name, combination_type=JOINED_BY[how], density=density
    )
