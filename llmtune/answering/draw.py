"""Draws the next token of each row from its own stream of random numbers, whatever other rows are in the batch."""

import random
from collections.abc import Sequence

import torch

from llmtune.answering.sampling import Sampling


def stream(seed: int, row: int, sample: int) -> random.Random:
    """Return the random numbers of one answer: they depend on the seed, the row and the sample alone."""
    return random.Random(f"{seed}.{row}.{sample}")


class Draw:
    """Draws the next tokens of rows, a number of each row's stream a token."""

    def __init__(self, sampling: Sampling, streams: Sequence[random.Random]) -> None:
        self.sampling, self.streams = sampling, streams

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the next tokens (B,) by logits (B, V) of the rows at these places."""
        points = [self.streams[row].random() for row in rows]
        return drawn(logits, self.sampling, torch.tensor(points, device=logits.device))


def drawn(logits: torch.Tensor, sampling: Sampling, points: torch.Tensor) -> torch.Tensor:
    """Return the tokens (B,) that points from 0 to 1 (B,) fall on, of the probabilities that logits (B, V) give.

    Temperature comes first, then top_k, then top_p of what is left, as in transformers.
    """
    ranked, tokens = logits.float().sort(descending=True, stable=True)
    probabilities = ((ranked - ranked[:, :1]) / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    sums = probabilities.cumsum(-1)
    kept = sums - probabilities < sampling.top_p * sums[:, -1:]
    kept &= probabilities > 0
    sums = (probabilities * kept).cumsum(-1)
    places = (sums <= points[:, None] * sums[:, -1:]).sum(-1)
    return tokens.gather(1, torch.minimum(places, kept.sum(-1) - 1)[:, None])[:, 0]
