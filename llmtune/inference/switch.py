"""One model that is the base or the tuned one: its adapter off or on, or its trained tensors changed for the base's."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llmtune.adapters.delta import TENSORS, load_delta, tensor_names
from llmtune.machine.device import free_bytes

AsBase = Callable[[], AbstractContextManager[object]]
"""Makes the tuned model the base inside a block."""


def load_switchable(model: PreTrainedModel, delta: Path) -> tuple[PreTrainedModel | PeftModel, AsBase]:
    """Return the tuned model of a base and a delta, and what makes it the base again for a while."""
    if not (delta / TENSORS).is_file():
        tuned = load_delta(model, delta)
        assert isinstance(tuned, PeftModel)
        return tuned, tuned.disable_adapter
    names = tensor_names(delta)
    waiting = _set_aside([parameter for name, parameter in model.named_parameters() if name in names])
    return load_delta(model, delta), waiting.exchanged


class WaitingTensors:
    """The values of some parameters that are not in the model now: beside it on its device, or on the host."""

    def __init__(self, waiting: list[tuple[torch.nn.Parameter, torch.Tensor]], beside: bool) -> None:
        self._waiting, self._beside = waiting, beside

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Put the waiting values into the model inside the block, and its own ones back afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for index, (parameter, other) in enumerate(self._waiting):
            now = parameter.data
            if self._beside:
                parameter.data = other
            else:
                now = now.to("cpu", copy=True)
                parameter.copy_(other)
            self._waiting[index] = (parameter, now)


def _set_aside(parameters: list[torch.nn.Parameter]) -> WaitingTensors:
    """Take the values of parameters aside, which may then be written over; from a full GPU they go to the host."""
    if not _fits_twice(parameters):
        return WaitingTensors([(parameter, parameter.data.to("cpu", copy=True)) for parameter in parameters], False)
    waiting = [(parameter, parameter.data) for parameter in parameters]
    for parameter, _ in waiting:
        parameter.data = torch.empty_like(parameter.data)
    return WaitingTensors(waiting, beside=True)


def _fits_twice(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether values of their own, for all of these, fit beside them and leave as much room again."""
    devices = {parameter.device for parameter in parameters}
    needed = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return all(device.type == "cpu" or 2 * needed <= free_bytes(device) for device in devices)
