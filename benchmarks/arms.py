"""The arms of the bench: what trains, for how long, and how many floating point operations that needs."""

from dataclasses import dataclass
from typing import Any

TOP, REACHES = 4, (0, 4, "all")
LORA = {"kind": "lora", "rank": 16, "alpha": 32}


@dataclass(frozen=True)
class Arm:
    """A method as a recipe says it, its epochs, and what the other tools train: the top blocks, all, or adapters."""

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
    "frozen-10": Arm({"kind": "frozen", "reach": TOP, "lr": 5e-4}, 10, top=TOP),
    "gradual-3": Arm({"kind": "gradual", "reaches": list(REACHES), "lr": 1e-4}, 3),
    "lora-top8": Arm({"kind": "frozen", "reach": 8, "lr": 5e-4, "adapter": LORA}, 3, top=8, lora=True),
    "qlora": Arm({"kind": "full", "lr": 5e-4, "adapter": LORA}, lora=True, quantize=True),
}


@dataclass(frozen=True)
class Shape:
    """What the count needs to know of a model: blocks, parameters of a block's matrices, and of the head."""

    blocks: int
    block: int
    head: int


def operations(arm: Arm, shape: Shape, tokens: int, supervised: int) -> float:
    """FLOPs that an arm's plan needs for one epoch of `tokens`, times its epochs; adapters and attention not counted.

    A matrix costs 2 per parameter and token forward, 2 for the gradient of its input, 2 for that of its weights. What
    does not train is needed once a row, whatever the epochs; backward stops at the farthest block that trains.
    """
    reaches = [TOP if reach == 4 else shape.blocks if reach == "all" else 0 for reach in REACHES]
    if arm.method["kind"] != "gradual":
        reaches = [arm.top or shape.blocks]
    total = 0.0
    passes = arm.epochs / len(reaches)
    deepest = shape.blocks - min(reaches)
    total += 2 * tokens * shape.block * deepest * (1 if min(reaches) < shape.blocks else passes)
    for reach in reaches:
        # The prefix of the first stage is counted above; a later, wider stage computes what is no longer frozen.
        backward = 2 if arm.lora else 4
        head = (2 + 2) + (2 if not arm.lora and reach == shape.blocks else 0)
        total += passes * (tokens * shape.block * reach * (2 + backward) + supervised * shape.head * head)
    return total
