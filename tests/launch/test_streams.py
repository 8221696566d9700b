"""What is printed when nobody reads it any more, or on a full disk: processes go on to their ends all the same."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.launch.command import training_environment
from llmtune.launch.process import Child
from llmtune.run import Run
from tests.support import ROOT, tiny

FULL = Path("/dev/full")
"""A file for which there is never space, on Linux."""
full_disk = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
TRAINING = """
import sys
from llmtune import terminal
from llmtune.launch.process import serve_command
def train(words):
    terminal.heading("train")
    print("step 1", flush=True)
    print("a warning", file=sys.stderr)
    print("what is left for the end of the process")
    return int(words[0])
serve_command(train)
"""


@pytest.fixture
def unread() -> Iterator[int]:
    """The end of a pipe to write to, whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def command(output: int, *words: str, **env: str) -> tuple[int, str]:
    """The exit code of a command that prints to `output`, and what it says on stderr."""
    ended = subprocess.run(
        [sys.executable, "-m", "llmtune", *words],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        check=False,
    )
    return ended.returncode, ended.stderr


def trained(folder: Path, output: int, code: int) -> int:
    """The exit code that the command sees of a training process that prints to `output` and ends with `code`."""
    child = Child([sys.executable, "-c", TRAINING, str(code)], training_environment(1, 1), folder)
    child.start(output)
    assert child.wait(60)
    return child.ended().code


@pytest.mark.parametrize("words", ["--version", "--help", "schema"])
def test_command_whose_output_nobody_reads_ends_quietly(unread: int, words: str) -> None:
    assert command(unread, words) == (0, "")


def test_command_whose_output_nobody_reads_ends_quietly_without_buffers(unread: int) -> None:
    assert command(unread, "schema", PYTHONUNBUFFERED="1") == (0, "")


@pytest.mark.parametrize("code", [0, 4])
def test_training_whose_output_nobody_reads_goes_on_to_its_end(tmp_path: Path, unread: int, code: int) -> None:
    assert trained(tmp_path, unread, code) == code


@full_disk
def test_training_whose_log_is_on_a_full_disk_goes_on_to_its_end(tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        assert trained(tmp_path, full.fileno(), 0) == 0


@full_disk
def test_command_says_that_a_full_disk_lost_what_it_printed() -> None:
    with FULL.open("wb") as full:
        code, told = command(full.fileno(), "--version")
    assert code == 3
    assert told == "llmtune: not all that was printed could be written: no space left on device; all else is done\n"


@pytest.mark.slow
def test_run_takes_every_step_after_its_reader_went_away(tmp_path: Path) -> None:
    base, rows = tiny.save_base(tmp_path / "base", blocks=2), tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(20))
    steps = {"eval": {"suite": "quick", "shots": 2}, "merge": {"dtype": "float32"}}
    recipe = tiny.write_recipe(tmp_path / "r.yaml", base, rows, None, **steps)
    words, env = [sys.executable, "-m", "llmtune", "run", str(recipe)], os.environ | {"PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    started = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    with open(reader, encoding="utf-8") as lines:
        assert lines.readline().startswith("starting to train")
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors
    run = Run(tmp_path / "runs" / "r")
    assert [name for name in ("train", "eval", "merge", "report") if not run.done(name)] == []
