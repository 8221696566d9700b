"""Whether the weights that should learn really move: updates below a weight's precision are rounded away in silence."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

AT_STEP = 20
SAMPLE = 1024
"""Elements of a tensor that are looked at."""
ENOUGH = 0.5


class Moved(TrainerCallback):
    """Measures at step 20, or half-way, which share of the elements that have a gradient the step changes."""

    def __init__(self, record: Callable[[dict[str, Any]], None]) -> None:
        self._record = record
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._share: float | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
        if state.global_step + 1 == min(AT_STEP, -(-state.max_steps // 2)):
            live = [parameter for parameter in model.parameters() if parameter.grad is not None]
            self._held = [(p, _sample(p.grad) != 0, _sample(p.detach()).clone()) for p in live]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        asked = sum(int(learns.sum()) for _, learns, _ in self._held)
        if not asked:
            return
        moved = sum(int((learns & (_sample(p.detach()) != before)).sum()) for p, learns, before in self._held)
        self._held, self._share = [], moved / asked
        if self._share < ENOUGH:
            said = f"warning: the step changed {self._share:.0%} of the elements that have a gradient"
            hint = "the others' updates were rounded away; a higher method.lr moves them"
            self._record({"step": state.global_step + 1, "warning": f"{said}; {hint}"})

    def take(self) -> dict[str, float]:
        """What the step's record says of it: the share once, nothing otherwise."""
        share, self._share = self._share, None
        return {} if share is None else {"changed": share}


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]
