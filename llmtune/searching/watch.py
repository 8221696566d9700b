"""Watches a training in this process: its pace, its validations, and when it should end."""

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Collection, Iterator
from statistics import fmean, median

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.arms.record import Point
from llmtune.machine.device import release_cached, run_device
from llmtune.training.loop import train
from llmtune.training.prepare import Prepared

LOOK = 1.0
"""Seconds between two looks whether a training should end, while it is between validations."""
_ODD = 5.0
"""How many times the median a step may take before something else is in it, such as the cache of frozen blocks."""

Report = Callable[[int, Point], bool]
"""Takes the number of a validation, from 1, and the validation; gives whether the training should end now."""


class Watch(TrainerCallback):
    """Notes pace and losses of a training, says when it is validated, and ends one that `report` says is behind.

    Without `saves` no checkpoint is written, but where a stop signal ends a training that `goes_on` later; any other
    ends at a stop signal at once.
    """

    def __init__(
        self,
        validate: Collection[int] | None = None,
        saves: bool = False,
        goes_on: bool = False,
        report: Report = lambda *_: False,
        stops: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`validate` are steps; the recipe's and the last one where it is None. `stops` is asked between them, too."""
        self.curve: list[Point] = []
        self.ended_early = False
        self.steps = self.total = 0
        self._validate, self._saves, self._goes_on = validate, saves, goes_on
        self._report, self._stops, self._clock = report, stops, clock
        self._began = self._step_began = self._looked = clock()
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
        if not (self._saves or self._goes_on):  # there is no checkpoint to wait for
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)

    def on_step_begin(self, *_: object, **named: object) -> None:
        """Let a step's seconds begin."""
        self._step_began = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: object
    ) -> None:
        """Note the step's seconds, and say whether it is validated and saved."""
        now = self._clock()
        self._steps.append(now - self._step_began)
        self.steps, self.total = state.global_step, state.max_steps
        is_last = self.steps >= self.total
        if self._validate is None:
            control.should_evaluate = control.should_evaluate or is_last
        else:
            control.should_evaluate = self.steps in self._validate
        is_stopped = control.should_training_stop and not is_last
        control.should_save = (control.should_save and self._saves) or (is_stopped and self._goes_on)
        if not control.should_evaluate and now - self._looked > LOOK:
            self._looked = now
            self._end_if(self._stops(), control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **named: object,
    ) -> None:
        """Note the loss, and end a training that is behind."""
        point = Point(step=state.global_step, seconds=round(self.seconds, 3), loss=float(metrics["eval_loss"]))
        self.curve.append(point)
        control.should_save = control.should_save and (self._saves or self._goes_on)
        is_over = control.should_training_stop or state.global_step >= state.max_steps
        self._end_if(self._report(len(self.curve), point) and not is_over, control)

    def _end_if(self, ends: bool, control: TrainerControl) -> None:
        if ends:
            self.ended_early = control.should_training_stop = True


def train_watched(prepared: Prepared, watch: Watch, keeps: bool) -> None:
    """Train a run in this process, and leave memory and the handlers of signals as they were before.

    A training replaces the handlers: they would ask one that is over to stop.
    """
    try:
        with _same_handlers():
            train(prepared.run, prepared, [watch], keeps)
    finally:
        gc.collect()
        release_cached(run_device())


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
