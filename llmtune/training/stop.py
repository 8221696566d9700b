"""SIGINT and SIGTERM: a checkpoint, then the end of training."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.errors import Interrupted
from llmtune.launch.process import EXIT_FILE, answer_stops

AGAIN = "press Ctrl-C again to end at once"
LOADING = f"stopping after the first step; {AGAIN}"
IN_STEPS = f"stopping after this step, with a checkpoint; {AGAIN}"


class Stop(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint and an end after the current step; a second one ends at once.

    In a single process the first one also ends at once while there is no step to lose, as in a long build of a cache.
    Each is answered at once: by the command that started the training, or without one by the first process.
    """

    def __init__(self) -> None:
        state = PartialState()
        self.requested = self._signalled = False
        self._waits, self._first = state.num_processes > 1, state.is_main_process
        self._answer = ""
        if self._waits:
            self._set_answer(LOADING)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def check(self, reached: int, steps: int, run: Path) -> None:
        """Raise Interrupted where a signal ended a training before its last step."""
        if self.requested and reached < steps:
            message = f"stopped at step {reached} of {steps}, with a checkpoint"
            raise Interrupted(f"{message}; continue with: llmtune run {run}")

    def _set_answer(self, words: str) -> None:
        if self._first and words != self._answer:
            answer_stops(words)
        self._answer = words

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Another process may have asked already, which `requested` says: that is no second signal here.
        if self._signalled or not self._waits:
            raise KeyboardInterrupt
        self._signalled = self.requested = True
        if self._first and EXIT_FILE not in os.environ:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"llmtune: {self._answer}\n".encode())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        self._waits = True
        self._set_answer(IN_STEPS)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        if PartialState().num_processes > 1:
            flag = torch.tensor([float(self.requested)], device=PartialState().device)
            self.requested = bool(reduce(flag, "sum").item())
        if self.requested:
            control.should_save = control.should_training_stop = True
