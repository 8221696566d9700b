"""What shows that something long goes on: lines outside a terminal, a line that vanishes on one, and the time left."""

import gc
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtune import working as module
from llmtune.working import Work, importing, own_process, use_stdout, working
from tests.support import ROOT

SWITCH = "TORCHDYNAMO_DISABLE"
IMPORTS = """
import gc, os, sys
from llmtune.launch.quiet import quiet_libraries
from llmtune.working import importing, own_process
own_process()
quiet_libraries()
with importing():
    import peft
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 100_000 and "TORCHDYNAMO_DISABLE" not in os.environ
import atexit, pathlib
file = open(sys.argv[1], "w")
file.write("kept open")
atexit.register(pathlib.Path(sys.argv[2]).write_text, "at exit")
sys.exit(7)
"""


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tells_share_and_time_left() -> None:
    now = [100.0]
    work = Work("hashing", 4_000_000, "bytes", clock=lambda: now[0])
    assert work.facts() == "0 B of 4.0 MB"
    work.step(3_999)
    assert work.facts() == "4.0 kB of 4.0 MB", "too little to tell how long the rest takes"
    work.step(-3_999)
    now[0] += 10
    work.step(1_000_000)
    assert work.facts() == "1.0 MB of 4.0 MB, 0:30 left"
    assert work.share == 0.25
    work.step(9_000_000)
    assert (work.share, work.facts()) == (1.0, "10.0 MB of 4.0 MB, 0:00 left")


def test_time_left_counts_what_was_done_earlier_at_the_pace_it_had() -> None:
    now = [50.0]
    work = Work("tuning", 10, "trials", clock=lambda: now[0])
    work.step(4, 120)
    assert work.facts() == "4 of 10 trials, 3:00 left"
    now[0] += 20
    work.step()
    assert work.facts() == "5 of 10 trials, 2:20 left"


def test_names_the_unit_and_counts_one_by_one() -> None:
    now = [0.0]
    work = Work("answering", 500, "rows", clock=lambda: now[0])
    now[0] = 4.0
    work.step()
    work.step()
    assert work.facts() == "2 of 500 rows, 16:36 left"


def test_prints_lines_to_a_pipe_and_nothing_for_what_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with working("reading"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    monkeypatch.setattr(module, "_ON_STDOUT", threading.Event())
    with working("loading", total=4, unit="files") as step:
        step()
        time.sleep(0.3)
        with working("hashing"):
            time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("loading: 1 of 4 files, ")
    assert len(lines) >= 3
    assert lines[-1] == "hashing"
    use_stdout()
    with working("merging"):
        time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out.startswith("merging")
    assert err == ""


def test_shows_one_line_on_a_terminal_and_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with working("loading [base]", total=10, unit="rows") as step:
        step(5)
        time.sleep(0.6)
    written = terminal.getvalue()
    assert "loading [base]" in written
    assert "5 of 10 rows" in written
    assert written.endswith("\x1b[2K")  # the line is erased


def test_other_processes_of_a_machine_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(module, "DELAY", 0.01)
    with working("loading"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_ends_with_an_error_of_the_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), working("loading"):
        raise KeyError
    monkeypatch.setattr(module, "DELAY", 0.01)
    monkeypatch.setattr(module, "_ON_STDOUT", threading.Event())
    with working("hashing"):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("hashing")


def test_names_imports_at_once_and_once_in_a_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with importing():
        assert capsys.readouterr() == ("", "")
    monkeypatch.delitem(sys.modules, "transformers")
    with importing():
        assert capsys.readouterr() == ("", "loading torch and transformers\n")
    use_stdout()
    with importing("loading accelerate and torch"):
        assert capsys.readouterr() == ("loading accelerate and torch\n", "")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with importing():
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("own", "users"), [(False, None), (True, None), (True, "0")])
def test_imports_change_nothing_that_lasts_in_a_process_of_a_caller(
    monkeypatch: pytest.MonkeyPatch, own: bool, users: str | None
) -> None:
    frozen = list[bool]()
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(module, "_OWN", threading.Event())
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    if own:
        own_process()
    if users:
        monkeypatch.setenv(SWITCH, users)
    during = dict[str, object]()

    def fail() -> None:
        during.update(collects=gc.isenabled(), switch=os.environ.get(SWITCH))
        raise ImportError

    with pytest.raises(ImportError), importing():
        fail()
    assert during == {"collects": False, "switch": users or ("1" if own else None)}
    assert (gc.isenabled(), os.environ.get(SWITCH)) == (True, users)
    assert frozen == [False] * own
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.slow
def test_process_of_its_own_loads_no_compiler_and_ends_with_all_files_written(tmp_path: Path) -> None:
    files = [tmp_path / "open", tmp_path / "last"]
    command = [sys.executable, "-c", IMPORTS, *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first, *later = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout, first) == (7, "", "loading torch and transformers")
    assert all(line.startswith(f"{first}: for ") for line in later), later  # where it takes over ten seconds
    assert [file.read_text() for file in files] == ["kept open", "at exit"]
