"""Tasks in child processes: their order, their GPUs and threads, how they end, and what a stop signal does."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from llmtune.errors import Interrupted, MachineError, RecipeError
from llmtune.launch.command import CORES, training_environment
from llmtune.machine.gpus import Gpus
from llmtune.pool import Ended, Task, open_pool, processes

STUB = """
import json, os, signal, sys, time
folder, name, how = sys.argv[1:]
seen = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LLMTUNE_PARENT", "LLMTUNE_CORES")
def note(event):
    with open(f"{folder}/events.jsonl", "a") as file:
        facts = {"name": name, "event": event, "pid": os.getpid()}
        file.write(json.dumps(facts | {key: os.environ.get(key) for key in seen}) + chr(10))
def save(*_):
    note("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
note("started")
print(name, "was here")
if how == "fails":
    open(os.environ["LLMTUNE_EXIT_FILE"], "w").write("4" + chr(10) + "the loss is not finite")
    sys.exit(4)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if how == "long" else float(how))
note("ended")
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a pool, on a machine of 8 cores, beside a module `stub` that notes what it sees."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", CORES):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def task(folder: Path, name: str, how: str, gpus: int = 0) -> Task:
    """A task that runs the stub."""
    return Task(name, "stub", (str(folder), name, how), gpus)


def events(folder: Path) -> list[dict[str, str]]:
    """What the stubs noted, in order."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_runs_one_after_another_and_says_why_one_failed(stub: Path) -> None:
    ends: list[Ended] = []
    tasks = [task(stub, "a", "0"), task(stub, "b", "fails"), task(stub, "c", "killed"), task(stub, "d", "0")]
    open_pool("local", stub).run(tasks, ends.append)
    assert [(end.task.name, end.code) for end in ends] == [("a", 0), ("b", 4), ("c", 137), ("d", 0)]
    assert ends[1].message == "the loss is not finite"
    assert ends[2].message.startswith("was killed (signal 9), probably by the system for lack of memory")
    assert [event["name"] for event in events(stub)] == ["a", "a", "b", "c", "d", "d"]
    assert {event["OMP_NUM_THREADS"] for event in events(stub)} == {"8"}
    assert {event["LLMTUNE_PARENT"] for event in events(stub)} == {str(os.getpid())}
    assert (stub / "arms" / "a" / "log.txt").read_text() == "a was here\n"


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_gives_each_task_gpus_of_its_own(stub: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(processes, "find_gpus", lambda: Gpus(3))
    monkeypatch.setenv(variable, "4,GPU-8f,6")
    pool = open_pool("gpus", stub)
    assert (pool.width(), pool.width(2)) == (3, 1)
    tasks = [task(stub, "pair", "0.3", gpus=2), task(stub, "a", "0"), task(stub, "b", "0"), task(stub, "all", "0", 3)]
    pool.run(tasks, lambda end: None)
    seen = {event["name"]: event[variable] for event in events(stub)}
    assert seen["pair"] == "4,GPU-8f"
    assert seen["a"] == seen["b"] == "6"
    assert sorted(seen["all"].split(",")) == ["4", "6", "GPU-8f"]
    order = [(event["name"], event["event"]) for event in events(stub)]
    assert order.index(("b", "started")) < order.index(("pair", "ended")) < order.index(("all", "started"))
    threads = {event["name"]: event["OMP_NUM_THREADS"] for event in events(stub)}
    assert threads == {"pair": "5", "a": "2", "b": "2", "all": "8"}


def test_shares_out_a_tasks_own_threads_among_what_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert training_environment(2, 16)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv(CORES, "4")
    assert training_environment(2, 16)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("gpus", "words"), [(Gpus(0), "has no GPU"), (Gpus(0, "the driver is old"), "is old"), (Gpus(1), "a needs 2")]
)
def test_says_which_gpus_are_missing(stub: Path, monkeypatch: pytest.MonkeyPatch, gpus: Gpus, words: str) -> None:
    monkeypatch.setattr(processes, "find_gpus", lambda: gpus)
    with pytest.raises(MachineError, match=words):
        open_pool("gpus", stub).run([task(stub, "a", "0", gpus=2)], lambda end: None)
    assert not (stub / "events.jsonl").exists()


def test_names_the_nearest_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--on gpu: is not one of these; did you mean 'gpus'"):
        open_pool("gpu", tmp_path)


def test_stop_signal_ends_tasks_in_order_and_starts_no_other(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_gpus", lambda: Gpus(2))

    def interrupt() -> None:
        while not (stub / "events.jsonl").exists() or len(events(stub)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    ends: list[Ended] = []
    with pytest.raises(Interrupted, match="the same command goes on") as stopped:
        open_pool("gpus", stub).run([task(stub, name, "long") for name in "abc"], ends.append)
    assert stopped.value.exit_code == 130
    assert ends == []
    assert sorted((event["name"], event["event"]) for event in events(stub)) == [
        ("a", "saved"),
        ("a", "started"),
        ("b", "saved"),
        ("b", "started"),
    ]


def test_error_of_the_caller_ends_what_runs(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_gpus", lambda: Gpus(2))

    def fail(end: Ended) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_pool("gpus", stub).run([task(stub, "a", "long"), task(stub, "b", "0")], fail)
    assert not any(psutil.pid_exists(int(event["pid"])) for event in events(stub))
