"""GPUs by name: memory that torch can use, and rates, as their makers state them."""

import math
from dataclasses import dataclass

from llmtune.errors import RecipeError, nearest
from llmtune.numbers import size

CONTEXT = 600 * 10**6
"""Bytes that CUDA, its kernels and cuBLAS hold on a card before a tensor does."""


@dataclass(frozen=True)
class Card:
    """A GPU: memory in bytes, and dense operations a second in 16 bits; None where that is not known."""

    name: str
    memory: int
    rate: float | None = None

    @property
    def free(self) -> int:
        """Bytes for a run on a card that nobody else uses."""
        return self.memory - CONTEXT

    @property
    def words(self) -> str:
        """The card in words: h100 (84.9 GB)."""
        return f"{self.name} ({size(self.memory)})" if self.rate else f"a card of {self.name} GB"


def _card(name: str, gib: float, tera: float) -> Card:
    return Card(name, round(gib * 2**30), tera * 1e12)


# Memory: what torch.cuda.get_device_properties reports. Rates: dense, 16-bit inputs, sums in fp32.
CARDS = {
    card.name: card
    for card in (
        _card("h200", 139.8, 989),  # NVIDIA H200 SXM data sheet
        _card("h100", 79.1, 989),  # NVIDIA H100 SXM data sheet (1,979 with sparsity)
        _card("a100-80", 79.1, 312),  # NVIDIA A100 80GB SXM data sheet
        _card("a100-40", 39.4, 312),  # NVIDIA A100 40GB SXM data sheet
        _card("l40s", 44.4, 362),  # NVIDIA L40S data sheet (733 with sparsity); ECC takes a part of 48 GB
        _card("rtx4090", 23.6, 165),  # NVIDIA Ada GPU architecture white paper, appendix A
        _card("rtx3090", 23.6, 71),  # NVIDIA Ampere GA102 GPU architecture white paper, table 2
        _card("t4", 14.6, 65),  # NVIDIA T4 data sheet; fp16 only
    )
}


def find_card(word: str) -> Card:
    """The card that a word names, or one of so many GB; raises RecipeError with the nearest name for any other word."""
    name = word.strip().lower()
    if name in CARDS:
        return CARDS[name]
    number = name.removesuffix("gb").strip()
    try:
        gigabytes = float(number)
    except ValueError:
        gigabytes = math.nan
    if 1 <= gigabytes <= 10_000:
        return Card(f"{gigabytes:g}", round(gigabytes * 10**9))
    hint = nearest(name, CARDS, 0.3) or f"; it knows {', '.join(CARDS)}."
    raise RecipeError(f"--gpu {word}: is no card that llmtune knows{hint} A number of GB is taken too")
