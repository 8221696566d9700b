"""What a model makes of its head's outputs: logits, scaled or capped."""

from typing import NamedTuple

import torch

NEAR = 1e-5
"""How far, relative, a model's logits may be from what `LogitScale` gives."""


class LogitScale(NamedTuple):
    """What a model does with the head's outputs z: scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """The logits in fp32."""
        logits = outputs.float() * self.scale if self.scale != 1 else outputs.float()
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def logit_probe(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Outputs of a head (1, V) in fp32 that tell what a model makes of them: from tiny to huge, of both signs."""
    sizes = torch.logspace(-3, 5, vocabulary, dtype=torch.float32, device=device)
    return (sizes * (1 - 2 * (torch.arange(vocabulary, device=device) % 2)))[None]


def recognize(outputs: torch.Tensor, logits: torch.Tensor) -> LogitScale | None:
    """The `LogitScale` that gives `logits` for `outputs` of `logit_probe`; None where no one does."""
    if logits.shape != outputs.shape:
        return None
    least = (logits.flatten()[0] / outputs.flatten()[0]).item()
    scales = (LogitScale(_rounded(least)), LogitScale(_rounded(least), logits.abs().max().item()))
    matching = (s for s in scales if torch.allclose(s(outputs), logits.float(), rtol=NEAR, atol=NEAR * abs(least)))
    return next(matching, None)


def _rounded(scale: float) -> float:
    """1 where a scale is 1 but for rounding, so that nothing is multiplied."""
    return 1.0 if abs(scale - 1) < 1e-6 else scale
