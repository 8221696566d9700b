"""What a merge computed on its way, by which it is proved."""

from dataclasses import dataclass

import torch

# Measured on SmolLM2-135M, whose logits reach 40: merging LoRA in fp32 moves them by 1.1e-4, rounding the merged
# weights to bfloat16 by 0.18, random changes of every weight by no more than rounding by 0.50. On tiny models of
# eight architectures rounding moved them by 0.4 to 2 times what the random changes did.
_FP32_BOUND = (1e-4, 1e-5)
"""Absolute, and as a share of the largest logit; the larger one counts."""
STATE_BOUND = (1e-3, 1e-4)
"""The same for hidden states, over which no norm stands: a lost or doubled adapter moves them by far more."""
_ROUNDING_BOUND = (4, 0.05)
"""Times the effect of random changes, and as a share of the largest logit, as a router may choose another expert."""


@dataclass
class Outcome:
    """What a merge computed on texts, and how far its steps are from each other."""

    tuned: torch.Tensor
    """Logits of base and delta."""
    rounded: torch.Tensor
    """Logits of the merged model, rounded."""
    shift: float
    """How far the delta moves the logits of the base."""
    in_memory: float
    """How far adding base and delta in fp32 moved them."""
    rounding: float | None
    """How far they move when every weight changes at random by less than its rounding error; None in fp32."""
    kind: str
    """The class of the model."""
    loaded_by: str
    """The class of transformers that loads it."""
    by: str = "shards"
    """shards or memory."""

    @property
    def scale(self) -> float:
        """The largest logit of the tuned model."""
        return float(self.tuned.abs().max())

    @property
    def fp32_bound(self) -> float:
        """How far logits may differ that are computed in fp32."""
        return fp32_bound(self.tuned)

    @property
    def bound(self) -> float:
        """How far the merged model's logits may be from the tuned model's."""
        if self.rounding is None:
            return self.fp32_bound
        return max(_ROUNDING_BOUND[0] * self.rounding, _ROUNDING_BOUND[1] * self.scale)


def fp32_bound(logits: torch.Tensor) -> float:
    """How far logits may differ that are computed in fp32."""
    return max(_FP32_BOUND[0], _FP32_BOUND[1] * float(logits.abs().max()))


def largest_gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference between two sets of logits."""
    return float((one - other).abs().max())
