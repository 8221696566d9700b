"""Whether the weights that should learn really move: updates below a weight's precision are rounded away in silence."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llmtune.errors import TrainingError
from llmtune.model.sharded import gather

AT_STEP = 20
SAMPLE = 1024
"""Elements of a tensor that are looked at."""
ENOUGH = 0.5


class UpdateCheck(TrainerCallback):
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


def prove_planned_changes(
    before: dict[str, int], model: nn.Module, trained: Collection[str], distance: dict[str, int]
) -> list[str]:
    """The tensors in `trained` that are still what their checksums `before` say.

    Raises TrainingError where something frozen changed, or where nothing at some distance did.
    """
    # What is empty was let go and cannot have trained.
    after = checksums({name: parameter for name, parameter in model.named_parameters() if parameter.numel()})
    changed = {name for name in after if before[name] != after[name]}
    moved = sorted(changed - set(trained))
    if moved:
        raise TrainingError(f"{moved[0]} should have stayed frozen but changed")
    still = {distance[name] for name in trained} - {distance[name] for name in changed}
    if still:
        raise TrainingError(f"nothing at distance {min(still)} changed, so it was not trained")
    return sorted(set(trained) - changed)


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A sum over the bits of every whole tensor, modulo 2**64; one changed element changes it."""
    return {name: int(_words(gather(tensor.detach())).sum()) for name, tensor in tensors.items()}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().flatten()
    gather = flat.numel() * flat.element_size() % 8 == 0
    return flat.view(torch.int64) if gather else flat.view(torch.uint8).to(torch.int64)
