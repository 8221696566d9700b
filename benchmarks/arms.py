"""The arms of the bench: what trains, for how many epochs, and the floating-point operations that it needs."""

from dataclasses import dataclass
from typing import Any

TOP, REACHES = 4, (0, 4, "all")
LORA = {"kind": "lora", "rank": 16, "alpha": 32}


@dataclass(frozen=True)
class Arm:
    """A recipe's method and epochs, and what the other tools train for it: the top blocks, all blocks, or LoRA."""

    method: dict[str, Any]
    epochs: int = 1
    top: int | None = None
    lora: bool = False
    quantize: bool = False


ARMS = {
    "lora": Arm({"kind": "full", "lr": 5e-4, "adapter": LORA}, lora=True),
    "full": Arm({"kind": "full", "lr": 1e-4}),
    "frozen": Arm({"kind": "frozen", "reach": TOP, "lr": 5e-4}, top=TOP),
    "frozen-3": Arm({"kind": "frozen", "reach": TOP, "lr": 5e-4}, 3, top=TOP),
    "gradual-3": Arm({"kind": "gradual", "reaches": list(REACHES), "lr": 1e-4}, 3),
    "lora-top": Arm({"kind": "frozen", "reach": 8, "lr": 5e-4, "adapter": LORA}, 3, top=8, lora=True),
    "qlora": Arm({"kind": "full", "lr": 5e-4, "adapter": LORA}, lora=True, quantize=True),
}
GRADUAL = {name for name, arm in ARMS.items() if arm.method["kind"] == "gradual"}
"""The arms for which other tools train all blocks from the first step on."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: the number of blocks, and the parameters of one block's matrices and of the head."""

    blocks: int
    block: int
    head: int


def operations(arm: Arm, shape: Shape, tokens: int, supervised: int) -> float:
    """Count the FLOPs that an arm needs for all its epochs of `tokens`, without those of adapters and attention.

    A matrix costs 2 FLOPs per parameter and token forward, 2 for the gradient of its input and 2 for that of its
    weights. Frozen blocks run once per row, whatever the epochs; backward stops at the lowest block that trains.
    """
    reaches = [shape.blocks if reach == "all" else reach for reach in arm.method.get("reaches", ())]
    if not reaches:
        reaches = [arm.top or shape.blocks]
    total = 0.0
    passes = arm.epochs / len(reaches)
    deepest = shape.blocks - min(reaches)
    total += 2 * tokens * shape.block * deepest * (1 if min(reaches) < shape.blocks else passes)
    for reach in reaches:
        # The frozen blocks of the first stage are counted above; a later stage also runs the blocks that it unfreezes.
        backward = 2 if arm.lora else 4
        head = (2 + 2) + (2 if not arm.lora and reach == shape.blocks else 0)
        total += passes * (tokens * shape.block * reach * (2 + backward) + supervised * shape.head * head)
    return total
