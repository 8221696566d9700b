"""Proves that a combined delta, read from disk, is the combination of the live deltas."""

from dataclasses import dataclass

import torch

from llmtune.errors import ProofError

FP32_BOUND = (1e-4, 1e-5)
"""The bound of a merge in fp32: absolute, and as a share of the largest logit; the larger one counts."""


@dataclass(frozen=True)
class Measured:
    """Logits on the same texts: of the base, of the live combination, and with the combined delta from disk."""

    base: torch.Tensor
    live: torch.Tensor
    stored: torch.Tensor

    def facts(self) -> dict[str, float]:
        """The largest gap to the live combination, its bound, and how far it is from the base.

        Raises ProofError for logits that are not finite, or a gap over the bound.
        """
        if not torch.isfinite(self.live).all():
            raise ProofError("the combination's logits are not finite; try smaller weights; nothing was written")
        scale = float(self.live.abs().max())
        bound, gap = max(FP32_BOUND[0], FP32_BOUND[1] * scale), float((self.stored - self.live).abs().max())
        if not gap <= bound:
            message = f"the combined delta's logits are {gap:.3g} from those of the live combination"
            raise ProofError(f"{message}, over the bound of {bound:.3g}; nothing was written")
        return {"gap": gap, "bound": bound, "shift": float((self.live - self.base).abs().max()), "largest_logit": scale}
