"""SIGINT and SIGTERM: a checkpoint, then the end of training."""

import signal
from types import FrameType

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Stop(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint and an end after the current step; a second one ends at once.

    In a single process the first one also ends at once while there is no step to lose, as in a long build of a cache.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = PartialState().num_processes > 1
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._waits:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        self._waits = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        if PartialState().num_processes > 1:
            flag = torch.tensor([float(self.requested)], device=PartialState().device)
            self.requested = bool(reduce(flag, "sum").item())
        if self.requested:
            control.should_save = control.should_training_stop = True
