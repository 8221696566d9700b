"""The training progress: what reaches log.jsonl, what a pipe sees, what a terminal sees, and what a resume keeps."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmtune.numbers import duration
from llmtune.run_log import Record, read_log
from llmtune.training.progress import Progress


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def record(step: int, loss: float = 2.0, **more: Any) -> Record:
    """A step's record."""
    return {
        "step": step,
        "loss": loss,
        "lr": {"0": 1e-3},
        "tokens": 100 * step,
        "tokens_per_s": 512.4,
        "peak_memory_mb": 1536,
        **more,
    }


def steps(log: Path) -> list[int]:
    """The steps of a log's lines."""
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_prints_plain_lines_to_a_pipe_every_twentieth_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with Progress(200, tmp_path / "log.jsonl", stage_starts=(0, 100), clock=clock) as progress:
        for step in range(1, 201):
            clock.now += 0.5
            progress.step(record(step))
            if step == 100:
                progress.evaluation({"step": 100, "eval_loss": 1.25})
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out
    assert "\x1b" not in out
    assert 20 <= len([line for line in lines if " tokens/s" in line]) <= 22
    assert lines[0] == "step   1/200  stage 1/2  loss 2.0000  512 tokens/s  1.6 GB  1:40 left"
    assert "step 100/200  validation loss 1.2500" in lines
    assert lines[-1].startswith("step 200/200  stage 2/2")
    assert lines[-1].endswith("0:00 left")


def test_prints_every_half_minute_of_a_slow_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(1000, tmp_path / "log.jsonl", clock=clock) as progress:
        for step in range(1, 13):
            clock.now += 10
            progress.step(record(step))
    counts = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert counts == ["1/1000", "4/1000", "7/1000", "10/1000"]


def test_writes_every_record_as_one_json_line_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Progress(3, log) as progress:
        progress.step(record(1, loss=math.nan))
        assert json.loads(log.read_text(), parse_constant=pytest.fail) == record(1) | {"loss": None}
        progress.step(record(2))
        progress.evaluation({"step": 2, "eval_loss": 1.0})
    assert steps(log) == [1, 2, 2]
    assert read_log(log)[2] == {"step": 2, "eval_loss": 1.0}


def test_empties_the_log_of_a_new_run(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(record(7)) + "\n")
    with Progress(3, log) as progress:
        progress.step(record(1))
        assert progress.previous == {}
    assert steps(log) == [1]


def test_drops_what_came_after_the_checkpoint_of_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    kept = [record(4), {"step": 4, "eval_loss": 1.5}]
    lines = [json.dumps(one) for one in [*kept, record(5), {"step": 5, "eval_loss": 1.4}, record(6)]]
    log.write_text("\n".join(lines) + '\n{"step": 7, "lo')
    clock = Clock()
    with Progress(10, log, start_step=4, clock=clock) as progress:
        assert progress.previous == record(4)
        assert read_log(log) == kept
        clock.now += 2
        progress.step(record(5, loss=1.0))
        assert progress.seconds_left() == pytest.approx(10)
    assert steps(log) == [4, 4, 5]
    out = capsys.readouterr().out
    assert out.startswith(
        "step  5/10  loss 1.4737"
    )  # (0.9 x 0.1 x 2.0 + 0.1 x 1.0) / (1 - 0.9^2): the old loss counts on


def test_estimates_time_left_from_the_latest_steps(tmp_path: Path) -> None:
    clock = Clock()
    with Progress(300, tmp_path / "log.jsonl", clock=clock) as progress:
        assert progress.seconds_left() is None
        for step in range(1, 101):
            clock.now += 1
            progress.step(record(step))
        assert progress.seconds_left() == pytest.approx(200)
        for step in range(101, 141):
            clock.now += 4
            progress.step(record(step))
        assert progress.seconds_left() == pytest.approx(160 * 4)


def test_prints_and_writes_only_in_the_first_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(record(1)) + "\n")
    with Progress(3, log, rank=1) as progress:
        progress.step(record(1, loss=9.0))
        progress.evaluation({"step": 1, "eval_loss": 1.0})
    assert capsys.readouterr().out == ""
    assert read_log(log) == [record(1)]


def test_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=100, legacy_windows=False, _environ={"TERM": "xterm"})
    clock = Clock()
    with Progress(60, tmp_path / "log.jsonl", stage_starts=(0, 20), console=console, clock=clock) as progress:
        for step in range(1, 31):
            clock.now += 2
            progress.step(record(step))
        progress.evaluation({"step": 30, "eval_loss": 1.25})
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for part in (
        "stage 2/2",
        "30/60",
        "loss 2.0000",
        "512 tokens/s",
        "1.6 GB",
        "1:00 left",
        "step 30/60  validation loss 1.2500",
    ):
        assert part in seen, part


def test_closes_the_bar_and_raises_the_error(tmp_path: Path) -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=100, legacy_windows=False, _environ={"TERM": "xterm"})
    with pytest.raises(KeyError), Progress(9, tmp_path / "log.jsonl", console=console) as progress:
        progress.step({"step": 1})
    assert screen.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (201, "3:21"), (3723, "1:02:03"), (59.7, "1:00")]
)
def test_formats_durations_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
