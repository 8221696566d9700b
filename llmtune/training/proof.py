"""Proof that exactly the planned weights changed, and that processes agree on them."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.errors import TrainingError
from llmtune.kernels.finite import is_finite
from llmtune.machine import processes
from llmtune.model.sharded import gather
from llmtune.run_log import Record

AT_STEP = 20
SAMPLE = 1024
"""Elements of a tensor that are looked at."""
ENOUGH = 0.5
ENOUGH_STEPS = 3
"""The steps with a rate after which a tensor should have changed: the first one gives LoRA's A no gradient."""
REMEDY = "A lower method.lr is the usual remedy"


class UpdateCheck(TrainerCallback):
    """Measures at step 20, or half-way, which share of the elements that have a gradient the step changes.

    A step that a gradient scaler skips is not measured; the next one is.
    Updates below a weight's precision are rounded away in silence.
    """

    def __init__(self, record: Callable[[Record], None]) -> None:
        self._record = record
        self._samples: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self._share: float | None = None
        self._waits = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **named: object
    ) -> None:
        if not self._waits and state.global_step + 1 != min(AT_STEP, -(-state.max_steps // 2)):
            return
        learning = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        # The gradient scaler of fp16 skips such a step.
        self._waits = args.fp16 and not all(_is_finite(gradient) for _, gradient in learning)
        if not self._waits:
            self._samples = [(p, _sample(g) != 0, _sample(p.detach()).clone()) for p, g in learning]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        elements = sum(int(learns.sum()) for _, learns, _ in self._samples)
        if not elements:
            return
        changed = sum(int((learns & (_sample(p.detach()) != before)).sum()) for p, learns, before in self._samples)
        self._samples, self._share = [], changed / elements
        if self._share < ENOUGH:
            warning = f"warning: the step changed {self._share:.0%} of the elements that have a gradient"
            hint = "the others' updates were rounded away; a higher method.lr moves them"
            self._record({"step": state.global_step + 1, "warning": f"{warning}; {hint}"})

    def take(self) -> Record:
        """What a step's record says of it: the share once, nothing otherwise."""
        share, self._share = self._share, None
        return {} if share is None else {"changed": share}


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = _local(tensor).flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]


def prove_schedule(
    before: dict[str, int],
    model: nn.Module,
    names: Collection[str],
    distance: dict[str, int],
    moves: Callable[[int, int], bool],
) -> list[str]:
    """The tensors in `names` that are still what `before` says, though they had steps enough to change.

    `moves` tells whether a distance had a rate above zero that many times. Raises as `prove_planned_changes`.
    """
    trained = [name for name in names if moves(distance[name], 1)]
    unchanged = prove_planned_changes(before, model, trained, distance)
    return [name for name in unchanged if moves(distance[name], ENOUGH_STEPS)]


def prove_planned_changes(
    before: dict[str, int], model: nn.Module, trained: Collection[str], distance: dict[str, int]
) -> list[str]:
    """The tensors in `trained` that are still what their checksums `before` say.

    Raises TrainingError where something frozen changed, nothing at some distance did, or something is not finite.
    """
    # What is empty was let go and cannot have trained.
    after = checksums({name: parameter for name, parameter in model.named_parameters() if parameter.numel()})
    changed = {name for name in after if before[name] != after[name]}
    unplanned = sorted(changed - set(trained))
    if unplanned:
        raise TrainingError(f"{unplanned[0]} should have stayed frozen but changed")
    spoilt = next((name for name in trained if not _is_finite(model.get_parameter(name))), None)
    if spoilt:
        raise TrainingError(f"{spoilt} holds numbers that are not finite after training. {REMEDY}")
    unchanged = {distance[name] for name in trained} - {distance[name] for name in changed}
    if unchanged:
        raise TrainingError(f"nothing at distance {min(unchanged)} changed, so it was not trained")
    return sorted(set(trained) - changed)


def _is_finite(tensor: torch.Tensor) -> bool:
    return is_finite(_local(tensor))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_validation(loss: float, step: int, last: int, record: Callable[[Record], None]) -> None:
    """Record a warning on a validation loss that is not finite; raises TrainingError where it is the last one."""
    if math.isfinite(loss):
        return
    message = f"the validation loss is {loss} at step {step}"
    if step >= last:
        raise TrainingError(f"{message}, the last one: the model is of no use; the last checkpoint is kept. {REMEDY}")
    record({"step": step, "warning": f"warning: {message}. {REMEDY}"})


def assert_replicas_equal(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Raise TrainingError where the processes hold different values of these tensors; each process must ask."""
    if processes.world() == 1:
        return
    # A tensor that is sharded has no second copy.
    mine = checksums({name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)})
    everyone = processes.gather(mine)
    differing = [name for name in mine if any(other[name] != mine[name] for other in everyone)]
    if differing:
        raise TrainingError(f"the processes' weights differ at step {step}: {differing[0]}")


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The checksum of every tensor, by name."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def checksum(tensor: torch.Tensor) -> int:
    """A sum over the bits of a whole tensor, modulo 2**64; one changed element changes it."""
    return int(_words(gather(tensor.detach())).sum())


def _words(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().flatten()
    fills_words = flat.numel() * flat.element_size() % 8 == 0
    return flat.view(torch.int64) if fills_words else flat.view(torch.uint8).to(torch.int64)


def warn_of_unchanged(unchanged: list[str], step: int, record: Callable[[Record], None]) -> None:
    """Record a warning that names the first of the tensors that should have changed, if any."""
    if unchanged:
        others = f" and {len(unchanged) - 1} more" if unchanged[1:] else ""
        record({"step": step, "warning": f"warning: never changed, though to be trained: {unchanged[0]}{others}"})
