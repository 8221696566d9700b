"""What goes on beside training: the request to stop, and the record of each step."""

import resource
import signal
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from llmtune.progress import Progress


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


def recorder(progress: Progress) -> Any:
    """A function that completes a step's record with time, speed and memory and hands it to the log."""
    began = time.monotonic()
    earlier = progress.previous.get("seconds", 0.0)
    last = (began, progress.previous.get("tokens", 0))

    def record(entry: dict[str, Any]) -> None:
        nonlocal last
        said = entry.get("prefix") or entry.get("warning")
        if said:
            progress.noted(entry, said)
            return
        if "eval_loss" in entry:
            progress.evaluated(entry)
            last = (time.monotonic(), last[1])
            return
        now = time.monotonic()
        speed = (entry["tokens"] - last[1]) / max(1e-9, now - last[0])
        last = (now, entry["tokens"])
        progress.step(
            entry | {"seconds": earlier + now - began, "tokens_per_s": speed, "peak_memory_mb": _peak_memory_mb()}
        )

    return record


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
