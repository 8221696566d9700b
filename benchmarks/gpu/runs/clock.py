"""A clock in a training: seconds of each step by events on the card, the first step's, and how busy the card was."""

import contextlib
import statistics
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Times every step of a Trainer without waiting for the card; the steps in `profiled` are not among those timed."""

    def __init__(self, device: str, warm: Collection[int] = (0, 1, 2), profiled: Sequence[int] = ()) -> None:
        self.device, self._warm, self._profiled = device, set(warm), list(profiled)
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far: the run begins anew."""
        self._marks: list[Any] = []
        self._steps = 0
        self._began = 0.0
        self.setup = self.first_step = 0.0
        self._profiler: Any = None
        self.busy: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self._steps == 0:
            self._wait()
            self.setup = time.perf_counter() - self._began
            self._marks.append(self._mark())
        if self._profiled and self._steps == self._profiled[0]:
            self._start_profile()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._marks.append(self._mark())
        self._steps += 1
        if self._steps == 1:
            self._wait()
            self.first_step = time.perf_counter() - self._began - self.setup
        if self._profiled and self._steps == self._profiled[-1] + 1:
            self._stop_profile()

    def _mark(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self) -> list[float]:
        """The seconds of every step, from the end of the one before."""
        self._wait()
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]

    def timed(self) -> list[float]:
        """The seconds of the steps that count: not warm-up, not profiled."""
        left_out = self._warm | set(self._profiled)
        return [seconds for step, seconds in enumerate(self.seconds()) if step not in left_out]

    def median(self) -> float:
        """The median of those seconds."""
        return statistics.median(self.timed())

    def _start_profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._wait()
        # Where a machine keeps its counters to itself, the run is timed without them.
        with contextlib.suppress(RuntimeError, AssertionError):
            profiler: Any = profile(activities=[getattr(ProfilerActivity, self.device.upper())])
            profiler.start()
            self._profiler = profiler
        self._profile_began = time.perf_counter()

    def _stop_profile(self) -> None:
        if self._profiler is None:
            return
        self._wait()
        wall = time.perf_counter() - self._profile_began
        self._profiler.stop()
        ranges = [
            (event.time_range.start, event.time_range.end)
            for event in self._profiler.events()
            if event.device_type.name == self.device.upper()
        ]
        self.busy, self._profiler = covered(ranges) / 1e6 / wall if ranges else None, None


def covered(ranges: Sequence[tuple[float, float]]) -> float:
    """The length that intervals cover together; where they overlap, it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
