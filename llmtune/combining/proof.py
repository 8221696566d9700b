"""Proves that a combined delta, read from disk, is the combination of the live deltas."""

from dataclasses import dataclass

import torch

from llmtune.errors import ProofError
from llmtune.merging.outcome import fp32_bound, largest_gap


@dataclass(frozen=True)
class Measured:
    """Logits on the same texts: of the base, of the live combination, and with the combined delta from disk."""

    base: torch.Tensor
    live: torch.Tensor
    stored: torch.Tensor

    def facts(self) -> dict[str, float]:
        """The largest gap to the live combination, its bound, that of a merge in fp32, and how far it is from the base.

        Raises ProofError for logits that are not finite, or a gap over the bound.
        """
        if not torch.isfinite(self.live).all():
            raise ProofError("the combination's logits are not finite; try smaller weights; nothing was written")
        bound, gap = fp32_bound(self.live), largest_gap(self.stored, self.live)
        if not gap <= bound:
            message = f"the combined delta's logits are {gap:.3g} from those of the live combination"
            raise ProofError(f"{message}, over the bound of {bound:.3g}; nothing was written")
        largest = float(self.live.abs().max())
        return {"gap": gap, "bound": bound, "shift": largest_gap(self.live, self.base), "largest_logit": largest}
