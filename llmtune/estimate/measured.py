"""Predicted memory beside what was measured, stage by stage, while a training runs."""

from collections.abc import Sequence

import torch

from llmtune.estimate.memory import forecast
from llmtune.estimate.passes import setting_of, without_copies
from llmtune.machine.peak import peak, reset_peak, resident_bytes
from llmtune.model.layout import Layout
from llmtune.numbers import size
from llmtune.recipe.sections import Recipe
from llmtune.run_log import Record


def stage_peaks(
    recipe: Recipe,
    layout: Layout,
    world: int,
    device: torch.device,
    longest: int,
    tokens: int,
    checkpointing: bool,
    copies: bool,
) -> list[int]:
    """Predicted bytes of each stage on one device, in passes of so many tokens of rows of up to `longest`.

    Without `copies`, CPUs keep no 16-bit copies of weights.
    """
    memory = forecast(layout, setting_of(recipe, world, device.type), longest)
    stages = (memory if copies else without_copies(memory)).stages
    return [stage.peak(tokens, checkpointing) for stage in stages]


class MemoryWatch:
    """Gives at the end of each stage a record of predicted and measured memory.

    Made before the base is loaded: on CPUs it counts from what the process holds then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0 if device.type == "cuda" else resident_bytes()
        self._ends: Sequence[int] = ()
        self._predicted: Sequence[int] = ()
        reset_peak(device)

    def expect(self, predicted: Sequence[int], ends: Sequence[int]) -> None:
        """Take the predicted bytes of each stage, and the step after its last one."""
        self._predicted, self._ends = predicted, ends

    def at(self, step: int) -> Record | None:
        """The record of the stage that ends with a step (1-based); None within a stage."""
        if step not in self._ends:
            return None
        stage = self._ends.index(step)
        predicted, measured = self._predicted[stage], peak(self._device)
        name = f"memory, stage {stage + 1}" if len(self._ends) > 1 else "memory"
        record: Record = {"step": step, "stage": stage + 1, "predicted": predicted}
        if measured.resident is None:
            allocated, reserved = measured.allocated or 0, measured.reserved or 0
            line = f"{name}: predicted {size(predicted)}, measured {size(allocated)} allocated"
            reset_peak(self._device)
            return record | {
                "memory": f"{line}, {size(reserved)} reserved",
                "allocated": allocated,
                "reserved": reserved,
            }
        over = max(0, measured.resident - self._before)
        line = f"{name}: predicted at most {size(predicted)}, measured {size(over)}"
        words = f"{line} over the {size(self._before)} that the process held before it loaded the base"
        return record | {"memory": words, "resident": over, "before": self._before}
