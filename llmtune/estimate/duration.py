"""How long a training computes, from the operations of its matrix products and the rate of a card."""

from dataclasses import dataclass

from llmtune.estimate.memory import StageMemory

SHARE_OF_RATE = 0.4
"""The share of a card's rate that training is taken to reach; docs/performance.md says what was measured."""


@dataclass(frozen=True)
class Amount:
    """What a stage works on: tokens in all processes, and the share of them that is learned."""

    tokens: float
    supervised: float = 1.0


def operations(stage: StageMemory, amount: Amount, checkpointing: bool, head: int, head_trains: bool) -> float:
    """Operations of a stage: forward, backward where it passes, forward again with checkpointing, and the head's.

    `head` is the number of its weights, which compute for learned tokens alone.
    """
    products, tokens = stage.trace.products, stage.trace.tokens
    again = products.forward if checkpointing else 0.0
    of_head = 2 * head * (2 + head_trains + 1) * amount.supervised  # its logits are computed twice, a few at a time
    return amount.tokens * ((products.forward + products.backward + again) / tokens + of_head)


def seconds(work: float, rate: float, cards: int = 1) -> float:
    """Seconds for so many operations on cards of this rate."""
    return work / (rate * SHARE_OF_RATE * cards)
