"""Training progress: every record into log.jsonl, and a bar on a terminal or readable lines anywhere else."""

import json
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from llmtune.estimate.measured import MemoryWatch
from llmtune.machine.device import run_device
from llmtune.machine.peak import peak
from llmtune.numbers import duration, size
from llmtune.run_log import Record, trim_log
from llmtune.timing.predicted import time_record

LINE_SHARE = 0.05
LINE_SECONDS = 30.0
PACE_STEPS = 30
SMOOTHING = 0.9
_NOTES = ("sources", "frozen_blocks", "rows", "passes", "warning", "memory", "time", "best", "hardware")
"""The keys of records that are a line for people."""


class Progress:
    """The display and the log of a training run from `start_step` on; a process that is not rank 0 does neither."""

    def __init__(
        self,
        total_steps: int,
        log: Path,
        *,
        start_step: int = 0,
        stage_starts: Sequence[int] = (0,),
        rank: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.log = log
        self.start_step = start_step
        self.stage_starts = tuple(stage_starts)
        self.previous: Record = {}
        self.also: Callable[[Record], None] | None = None
        """Gets every record that is logged."""
        self._rank = rank
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._clock = clock
        self._times: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)
        self._smooth = Average(SMOOTHING)
        self._line_at = (start_step, -math.inf)
        self._file: TextIO | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        for record in trim_log(self.log, self.start_step, write=self._rank == 0):
            if "loss" in record:
                self.previous = record
                self._smooth.add(record["loss"])
        self._times.append((self.start_step, self._clock()))
        if self._rank == 0:
            self._file = self.log.open("a", encoding="utf-8")
            if self._console.file.isatty() and not self._console.is_dumb_terminal:
                self._bar = _bar(self._console)
                self._bar.add_task("train", total=self.total_steps, completed=self.start_step, facts="")
                self._bar.start()
            else:
                self._line_at = (self.start_step, self._clock())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()
            self._file = None

    def step(self, record: Record) -> None:
        """Log and show one optimizer step; `record` has at least `step` (1-based) and `loss`."""
        self._times.append((record["step"], self._clock()))
        self._smooth.add(record["loss"])
        self._write(record)
        if self._bar:
            stage, facts = self._stage(record["step"]) or "train", "  ".join(self._facts(record))
            self._bar.update(self._bar.tasks[0].id, completed=record["step"], description=stage, facts=facts)
        elif self._due(record["step"]):
            self._line_at = (record["step"], self._clock())
            count = f"step {record['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
            self._print("  ".join(filter(None, [count, self._stage(record["step"]), *self._facts(record)])))

    def evaluation(self, record: Record) -> None:
        """Log and show one validation; `record` has `step` and `eval_loss`."""
        self._write(record)
        score = f"  exact match {record['eval_score']:.3f}" if "eval_score" in record else ""
        self._print(f"step {record['step']}/{self.total_steps}  validation loss {record['eval_loss']:.4f}{score}")

    def note(self, record: Record, line: str) -> None:
        """Log and show any other message of the run; `record` has `step`."""
        self._write(record)
        self._print(line)

    def seconds_left(self) -> float | None:
        """Seconds to the last step at the pace of the latest ones, validations included; None before one is done."""
        (first_step, first), (last_step, last) = self._times[0], self._times[-1]
        if last_step == first_step:
            return None
        return (last - first) / (last_step - first_step) * max(0, self.total_steps - last_step)

    def _write(self, record: Record) -> None:
        if self._file:
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }
            self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
            self._file.flush()
            if self.also:
                self.also(finite)

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False)
        elif self._file:
            print(line, file=self._console.file, flush=True)

    def _due(self, step: int) -> bool:
        at_step, at = self._line_at
        first_or_last = step in (self.start_step + 1, self.total_steps)
        return first_or_last or step - at_step >= LINE_SHARE * self.total_steps or self._clock() - at >= LINE_SECONDS

    def _stage(self, step: int) -> str:
        if len(self.stage_starts) < 2:
            return ""
        return f"stage {bisect_right(self.stage_starts, step - 1)}/{len(self.stage_starts)}"

    def _facts(self, record: Record) -> list[str]:
        facts = [f"loss {self._smooth.value:.4f}"]
        if record.get("tokens_per_s") is not None:
            facts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if record.get("peak_memory_mb") is not None:
            facts.append(size(record["peak_memory_mb"] * 2**20))
        left = self.seconds_left()
        if left is not None:
            facts.append(f"{duration(left)} left")
        return facts


class Average:
    """An exponential moving average, corrected for its start at 0."""

    def __init__(self, keep: float) -> None:
        self._keep, self._sum, self._weight = keep, 0.0, 0.0

    def add(self, value: float | None) -> float:
        """The average with one more value; a value that is no finite number does not count."""
        if value is not None and math.isfinite(value):
            self._sum = self._keep * self._sum + (1 - self._keep) * value
            self._weight = self._keep * self._weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        """The average so far, NaN before the first value."""
        return self._sum / self._weight if self._weight else math.nan


def _bar(console: Console) -> Bar:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    ]
    return Bar(*columns, console=console, expand=True)


def step_recorder(
    progress: Progress, watch: MemoryWatch | None = None, predicted: float | None = None
) -> Callable[[Record], None]:
    """A function that completes a step's record with time, speed and memory and hands it to the log.

    `watch` adds predicted and measured memory at the end of each stage, `predicted` seconds of all steps what they took
    after the last one.
    """
    began = time.monotonic()
    earlier = progress.previous.get("seconds", 0.0)
    last = (began, progress.previous.get("tokens", 0))

    def record(entry: Record) -> None:
        nonlocal last
        message = next((entry[kind] for kind in _NOTES if entry.get(kind)), None)
        if message:
            progress.note(entry, message)
            return
        if "eval_loss" in entry:
            progress.evaluation(entry)
            last = (time.monotonic(), last[1])
            return
        now = time.monotonic()
        measured = {"seconds": earlier + now - began, "peak_memory_mb": _peak_memory_mb()}
        if "tokens" in entry:
            measured["tokens_per_s"] = (entry["tokens"] - last[1]) / max(1e-9, now - last[0])
        last = (now, entry.get("tokens", 0))
        progress.step(entry | measured)
        memory = watch and watch.at(entry["step"])
        if memory:
            progress.note(memory, memory["memory"])
        if predicted is not None and entry["step"] == progress.total_steps:
            spent = time_record(entry["step"], predicted, measured["seconds"])
            progress.note(spent, spent["time"])

    return record


def _peak_memory_mb() -> float:
    most = peak(run_device())
    return (most.allocated or most.resident or 0) / 2**20
