"""The boundary of every command: its exit codes, its one line, and what stop signals lead to."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError, RecipeError
from llmtune.launch.guard import guarded_step, run_command
from llmtune.run import Run


def raising(error: BaseException) -> int:
    raise error


def test_returns_the_commands_code() -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 5) == 5


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: raising(RecipeError("wrong"))) == 2
    assert capsys.readouterr().err == "llmtune: wrong\n"


def test_a_pipe_to_another_program_that_broke_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: raising(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))) == 3
    assert capsys.readouterr().err == "llmtune: Broken pipe\n"


def test_a_fault_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_command(lambda: raising(ZeroDivisionError("division by zero"))) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("llmtune: a fault of llmtune, not of yours: ZeroDivisionError: division by zero (")
    assert printed.count("\n") == 1


@pytest.fixture(autouse=True)
def _signals_as_in_a_new_process() -> Iterator[None]:
    """Let signals do what they do in a new process: a training in this one leaves handlers, nohup ignores SIGHUP."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_is_one_line_and_128_plus_its_number(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    assert run_command(lambda: signal.raise_signal(number)) == 128 + number
    assert capsys.readouterr().err == "llmtune: stopped\n"
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["eval", "merge", "publish"])
def test_a_stop_in_a_step_says_what_is_safe_and_how_to_continue(
    tmp_path: Path, number: signal.Signals, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "a run")

    def command() -> None:
        with guarded_step(run, step):
            signal.raise_signal(number)

    assert run_command(command) == 128 + number
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "was stopped; training is safe in " in line
    assert line.endswith(f"continue with: llmtune run '{run.path}'\n")


@pytest.mark.parametrize(("step", "code"), [("eval", 5), ("merge", 5), ("publish", 6), ("report", 1)])
def test_a_fault_in_a_step_has_the_steps_code(tmp_path: Path, step: str, code: int) -> None:
    with pytest.raises(LlmtuneError, match="a fault of llmtune") as caught, guarded_step(Run(tmp_path), step):
        raise TypeError("no")
    assert caught.value.exit_code == code
    assert (tmp_path / "error.txt").is_file()


def test_a_command_forgets_what_other_launchers_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("HF_HOME", "/kept")
    run_command(lambda: None)
    assert "WORLD_SIZE" not in os.environ
    assert os.environ["HF_HOME"] == "/kept"
