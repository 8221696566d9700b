"""What goes on beside training: the request to stop, and the record of each step."""

import signal
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback


class Stop(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint and an end after the current step; a second one ends at once.

    Where one process trains, so does the first before there is a step to lose, be it in a long build of a prefix.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = PartialState().num_processes > 1
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked or not self._waits:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._waits = True

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if PartialState().num_processes > 1:
            flag = torch.tensor([float(self.asked)], device=PartialState().device)
            self.asked = bool(reduce(flag, "sum").item())
        if self.asked:
            control.should_save = control.should_training_stop = True
