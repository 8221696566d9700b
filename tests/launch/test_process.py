"""Child processes: their exit codes and messages, an orderly end after a stop signal, and their number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune.errors import Interrupted, RecipeError
from llmtune.launch import process
from llmtune.launch.command import config_file, training_environment
from llmtune.launch.process import EXIT_FILE, exit_process, leave_code, report_failure

EXECUTE = """
import sys
from llmtune.launch.command import training_environment
from llmtune.launch.process import execute
ended = execute(sys.argv[2:], training_environment(1, 2), launcher=sys.argv[1] == "launcher")
sys.exit(ended.code)
"""
# A launcher like accelerate's: it starts the training and turns every failure into 1; Ctrl-C ends it at once.
LAUNCHER = "import subprocess, sys\nsys.exit(min(1, subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()))"
TRAINING = """
import signal, sys, time
from pathlib import Path
from llmtune.launch.process import exit_process
folder, times = Path(sys.argv[1]), 0
def ask(number, frame):
    global times
    times += 1
    (folder / f"signal-{times}").touch()
    if sys.argv[2] == "orderly":
        time.sleep(0.5)
        (folder / "checkpoint").touch()
        exit_process(130)
signal.signal(signal.SIGTERM, ask)
(folder / "started").touch()
while True:
    time.sleep(60)
"""
# A program for the real launcher: it prints what it sees.
PROBE = """
import json, os, time
from accelerate import PartialState
state = PartialState(cpu=True)
facts = dict(rank=state.process_index, world=state.num_processes, backend=state.backend)
facts |= {key: os.environ.get(key) for key in ("MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "LLMTUNE_WORLD")}
print("PROBE " + json.dumps(facts) + "\\n", end="", flush=True)
time.sleep(float(os.environ.get("TOGETHER", 0)))
state.destroy_process_group()
"""


def script(folder: Path, name: str, text: str) -> str:
    """A Python file."""
    (folder / name).write_text(text)
    return str(folder / name)


def execute(*arguments: str, launcher: bool = True) -> int:
    """The code of one Python child, run by `execute` in this process."""
    return process.execute([sys.executable, "-c", *arguments], training_environment(1, 1), launcher).code


def stoppable(folder: Path, manner: str, alone: bool = False) -> subprocess.Popen[bytes]:
    """A process that executes a launcher that started a training; it is in a group of its own, as under a shell."""
    training = [script(folder, "training.py", TRAINING), str(folder), manner]
    words = ["launcher", sys.executable, script(folder, "launcher.py", LAUNCHER), *training]
    if alone:
        words = ["alone", sys.executable, *training]
    started = subprocess.Popen([sys.executable, "-c", EXECUTE, *words], process_group=0)
    wait_for(folder / "started")
    return started


def wait_for(file: Path) -> None:
    """Return when a file is there."""
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 2, 130])
def test_returns_the_childs_exit_code(code: int) -> None:
    assert execute(f"raise SystemExit({code})") == code


def test_returns_128_plus_the_signal_of_a_killed_child() -> None:
    assert execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 137
    assert execute("import os, signal; os.kill(os.getpid(), signal.SIGINT)") == 130


@pytest.mark.parametrize("code", [0, 4, 130])
@pytest.mark.slow
def test_keeps_the_exit_code_through_a_launcher_that_returns_1(tmp_path: Path, code: int) -> None:
    leave = script(tmp_path, "leave.py", f"from llmtune.launch.process import exit_process\nexit_process({code})")
    assert execute(LAUNCHER, leave) == code
    assert EXIT_FILE not in os.environ


def test_returns_the_code_of_the_first_rank_to_fail(tmp_path: Path) -> None:
    leave = script(
        tmp_path,
        "leave.py",
        "import sys\nfrom llmtune.launch.process import exit_process\nexit_process(int(sys.argv[1]))",
    )
    ranks = "import subprocess, sys\nfor code in '34': subprocess.run([sys.executable, sys.argv[1], code])\nsys.exit(1)"
    assert execute(ranks, leave) == 3


def test_failed_rank_exits_before_anything_can_abort_it(tmp_path: Path) -> None:
    leave = "import atexit, os; from llmtune.launch import process; atexit.register(os.abort); print('printed'); "
    leave += "process.exit_process(4)"
    env = {**os.environ, "WORLD_SIZE": "2"}
    result = subprocess.run([sys.executable, "-c", leave], env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (4, "printed\n")


def test_returns_the_trainings_message_with_its_code(tmp_path: Path) -> None:
    tell = "from llmtune import errors\nfrom llmtune.launch import process\n"
    tell += "process.exit_process(process.report_failure(errors.ProofError('a line, with ünïcode')))"
    ended = process.execute([sys.executable, "-c", tell], training_environment(1, 1), launcher=False)
    assert (ended.code, ended.message) == (5, "a line, with ünïcode")


def test_reports_on_stderr_without_a_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(EXIT_FILE, raising=False)
    assert report_failure(RecipeError("wrong")) == 2
    assert capsys.readouterr().err == "llmtune: wrong\n"


def test_exits_plainly_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXIT_FILE, raising=False)
    for code in (0, 4, 130):
        with pytest.raises(SystemExit) as caught:
            exit_process(code)
        assert caught.value.code == code


def test_stopped_rank_exits_with_0_so_that_others_finish_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    with pytest.raises(SystemExit) as caught:
        exit_process(Interrupted.exit_code)
    assert caught.value.code == 0
    assert (tmp_path / "code").read_text() == "130\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["group", "process"]
)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "launched"])
def test_stop_waits_for_the_checkpoint(tmp_path: Path, number: signal.Signals, whole_group: bool, alone: bool) -> None:
    started = stoppable(tmp_path, "orderly", alone)
    (os.killpg if whole_group else os.kill)(started.pid, number)
    assert started.wait(30) == 128 + number
    assert (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "signal-2").exists()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "launched"])
@pytest.mark.slow
def test_third_stop_kills_a_training_that_does_not_end(tmp_path: Path, alone: bool) -> None:
    started = stoppable(tmp_path, "stubborn", alone)
    for count in (1, 2):
        os.killpg(started.pid, signal.SIGINT)
        wait_for(tmp_path / f"signal-{count}")
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(30) == 130


def test_stop_before_training_begins_ends_it_at_once_and_silently(tmp_path: Path) -> None:
    waits = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    for words in (["launcher"], ["alone"]):
        words += [sys.executable, "-c", waits]
        started = subprocess.Popen([sys.executable, "-c", EXECUTE, *words], process_group=0, stderr=subprocess.PIPE)
        wait_for(tmp_path / "up")
        os.killpg(started.pid, signal.SIGINT)
        assert started.communicate(timeout=30)[1] == b""
        assert started.returncode == 130
        (tmp_path / "up").unlink()


@pytest.mark.slow
def test_answers_ctrl_c_at_once_in_the_trainings_words(tmp_path: Path) -> None:
    words = TRAINING.replace(
        "signal.signal(",
        "from llmtune.launch.process import answer_stops\nanswer_stops('stopping after this step')\nsignal.signal(",
        1,
    )
    training = [sys.executable, script(tmp_path, "training.py", words), str(tmp_path), "orderly"]
    command = [sys.executable, "-c", EXECUTE, "alone", *training]
    started = subprocess.Popen(command, process_group=0, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "started")
    os.killpg(started.pid, signal.SIGINT)
    assert started.stderr is not None
    assert started.stderr.readline() == "llmtune: stopping after this step\n"
    assert not (tmp_path / "checkpoint").exists()
    assert started.wait(30) == 130


def test_signal_that_kills_a_launched_process_outweighs_what_others_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    report_failure(RecipeError("connection closed by peer"))
    leave_code(128 + signal.SIGTERM)
    assert (tmp_path / "code").read_text() == "2\nconnection closed by peer"
    leave_code(128 + signal.SIGKILL)
    assert (tmp_path / "code").read_text() == "137\n"


def test_failure_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "none" / "code"))
    assert report_failure(RecipeError("wrong")) == 2
    assert capsys.readouterr().err == "llmtune: wrong\n"


def test_restores_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    execute("pass")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def probe(folder: Path, name: str, count: int, **env: str) -> subprocess.Popen[str]:
    """A real `accelerate launch` of the probe."""
    script(folder, "probe_module.py", PROBE)
    file = str(config_file(name))
    words = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        file,
        "--num_processes",
        str(count),
        "-m",
        "probe_module",
    ]
    env = {**training_environment(count, 2), "PYTHONPATH": str(folder), **env}
    return subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE, text=True, cwd=folder)


def facts(started: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What each process of a probe printed, by rank."""
    out = started.communicate(timeout=120)[0]
    assert started.returncode == 0
    printed = [json.loads(line.removeprefix("PROBE ")) for line in out.splitlines() if line.startswith("PROBE ")]
    return sorted(printed, key=lambda one: one["rank"])


@pytest.mark.slow
def test_joins_two_processes_by_gloo_in_each_of_two_launches(tmp_path: Path) -> None:
    both = [facts(started) for started in [probe(tmp_path, "multi_cpu", 2, TOGETHER="3") for _ in range(2)]]
    for ranks in both:
        assert [one["rank"] for one in ranks] == [0, 1]
        assert {(one["world"], one["backend"]) for one in ranks} == {(2, "gloo")}
        assert len({one["MASTER_PORT"] for one in ranks}) == 1
    assert both[0][0]["MASTER_PORT"] != both[1][0]["MASTER_PORT"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("cpu", 1), ("multi_cpu", 2)])
def test_ignores_accelerates_default_config_in_the_home_folder(tmp_path: Path, name: str, count: int) -> None:
    cache = tmp_path / "home" / ".cache" / "huggingface"
    hostile = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1}
    hostile |= {"num_processes": 3, "main_process_port": 1, "mixed_precision": "fp16", "gpu_ids": "7,8", "debug": True}
    (cache / "accelerate").mkdir(parents=True)
    (cache / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(hostile))
    ranks = facts(probe(tmp_path, name, count, HOME=str(tmp_path / "home"), HF_HOME=str(cache)))
    assert len(ranks) == count
    for one in ranks:
        assert (one["world"], one["ACCELERATE_MIXED_PRECISION"], one["LLMTUNE_WORLD"]) == (count, "no", str(count))


@pytest.mark.slow
def test_launcher_would_follow_the_home_folder_without_a_config(tmp_path: Path) -> None:
    cache = tmp_path / "accelerate"
    cache.mkdir()
    shutil.copy(config_file("cpu"), cache / "default_config.yaml")
    with (cache / "default_config.yaml").open("a") as file:
        file.write("no_such_key: 1\n")
    words = [sys.executable, "-m", "accelerate.commands.launch", "-m", "this"]
    env = {**training_environment(1, 2), "HF_HOME": str(tmp_path)}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "no_such_key" in ended.stderr
