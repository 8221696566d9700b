"""A training process ends when the command that started it is gone, itself or through a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.launch.test_process import LAUNCHER, script, wait_for

COMMAND = """
import sys
from llmtune.launch.command import training_environment
from llmtune.launch.process import execute
execute(sys.argv[2:], training_environment(1, 2), launcher=sys.argv[1] == "launcher")
"""
TRAINING = """
import os, signal, sys, time
from pathlib import Path
from llmtune.launch.parent import follow_parent
follow_parent()
def save(number, frame):
    Path(sys.argv[1], "checkpoint").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "pid.part").write_text(str(os.getpid()))
Path(sys.argv[1], "pid.part").rename(Path(sys.argv[1], "pid"))
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether a process ended, within ten seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("launched", "victim"),
    [(False, "command"), (True, "command"), (True, "launcher")],
    ids=["alone", "command", "launcher"],
)
@pytest.mark.slow
def test_training_saves_and_ends_when_what_started_it_is_killed(tmp_path: Path, launched: bool, victim: str) -> None:
    words = [sys.executable, script(tmp_path, "training.py", TRAINING), str(tmp_path)]
    if launched:
        words = [sys.executable, script(tmp_path, "launcher.py", LAUNCHER), *words[1:]]
    command = subprocess.Popen([sys.executable, "-c", COMMAND, "launcher" if launched else "alone", *words])
    wait_for(tmp_path / "pid")
    training = int((tmp_path / "pid").read_text())
    launchers = [child.pid for child in psutil.Process(command.pid).children() if child.pid != training]
    os.kill(command.pid if victim == "command" else launchers[0], signal.SIGKILL)
    command.wait(20)
    assert gone(training)
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_training_that_no_command_started_outlives_its_parent(tmp_path: Path) -> None:
    training = script(tmp_path, "training.py", TRAINING)
    starts = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]])"
    subprocess.run([sys.executable, "-c", starts, training, str(tmp_path)], check=True)
    wait_for(tmp_path / "pid")
    time.sleep(1.5)
    pid = int((tmp_path / "pid").read_text())
    assert not (tmp_path / "checkpoint").exists()
    os.kill(pid, signal.SIGKILL)
