"""Watches a training of a comparison: its pace, its validations, and when it should end."""

import time
from collections.abc import Callable, Collection
from statistics import fmean, median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.arms.record import Point

_ODD = 5.0
"""How many times the median a step may take before something else is in it, such as the cache of frozen blocks."""


class Watch(TrainerCallback):
    """Validates after given steps, notes pace and losses, and ends a training that `is_behind` says is behind.

    Without `saves` no checkpoint is written, but where a stop signal ends a training that `goes_on` later.
    """

    def __init__(
        self,
        validate: Collection[int],
        saves: bool = False,
        goes_on: bool = False,
        is_behind: Callable[[int, float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_behind` gets the number of a validation, from 1, and its loss."""
        self.curve: list[Point] = []
        self.ended_early = False
        self._validate, self._saves, self._goes_on = set(validate), saves, goes_on
        self._is_behind, self._clock = is_behind, clock
        self._began = self._step_began = clock()
        self._steps: list[float] = []

    @property
    def step_seconds(self) -> float:
        """Seconds of a usual step; the first one, which warms up, counts where there is no other."""
        steps = self._steps[1:] or self._steps or [0.0]
        usual = [one for one in steps if one <= _ODD * median(steps)]
        return fmean(usual or steps)

    @property
    def seconds(self) -> float:
        """Seconds since the training began."""
        return self._clock() - self._began

    @property
    def last_loss(self) -> float | None:
        """The loss of the latest validation."""
        return self.curve[-1]["loss"] if self.curve else None

    def on_train_begin(self, *_: object, **named: object) -> None:
        """Let the seconds begin."""
        self._began = self._clock()

    def on_step_begin(self, *_: object, **named: object) -> None:
        """Let a step's seconds begin."""
        self._step_began = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        """Note the step's seconds, and say whether it is validated and saved."""
        self._steps.append(self._clock() - self._step_began)
        control.should_evaluate = state.global_step in self._validate
        is_stopped = control.should_training_stop and state.global_step < state.max_steps
        control.should_save = (control.should_save and self._saves) or (is_stopped and self._goes_on)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any],
        **named: object,
    ) -> None:
        """Note the loss, and end a training that is behind."""
        loss = float(metrics["eval_loss"])
        self.curve.append({"step": state.global_step, "seconds": self.seconds, "loss": loss})
        if self._is_behind and state.global_step < state.max_steps and self._is_behind(len(self.curve), loss):
            self.ended_early = control.should_training_stop = True
