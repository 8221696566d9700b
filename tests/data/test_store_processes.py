"""Processes that encode: what they answer, what becomes of their failures, and what a killed one leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from llmtune.data.store import build, pool
from llmtune.data.store.batches import encode_batch, write_part
from llmtune.data.store.pool import MEMORY, NoStartError, encode_in_processes, processes_for
from llmtune.data.store.read import read_part
from llmtune.errors import FieldError, FullMemoryError, MachineError, RecipeError
from llmtune.recipe.data import Data
from tests.data.test_store import JOB, encoded_files, write
from tests.data.test_store import cache as cache
from tests.support import tiny

BATCHES = [(number, 5 * number, 5 * number + 5) for number in range(6)]
ANSWERING = """
import json, os, sys, time
for line in sys.stdin:
    number = json.loads(line)[0]
    {}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that lets processes answer as some code says, which knows the `number` of a batch."""

    def replace_worker(code: str) -> None:
        def start(folder: Path) -> "subprocess.Popen[str]":
            command = [sys.executable, "-S", "-c", ANSWERING.format(code)]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        monkeypatch.setattr(pool, "_start", start)

    return replace_worker


def test_a_process_starts_for_each_core_and_memory_that_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for free, count in ((100 * MEMORY, 64), (2 * MEMORY + 1, 2), (1000, 1)):
        monkeypatch.setattr(pool, "free_memory", lambda free=free: free)
        assert processes_for(64_000, 1000) == count


def test_parts_are_given_as_they_are_finished(tmp_path: Path, answer: Callable[[str], None]) -> None:
    answer("answer = {'part': f'/parts/{number}'}")
    finished = dict(encode_in_processes(BATCHES, tmp_path, 3))
    assert finished == {batch: Path(f"/parts/{batch[0]}") for batch in BATCHES}


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        ("{'message': f'{number}: bad', 'kind': 'RecipeError'}", RecipeError, "^2: bad"),
        ("{'key': 'data.train', 'message': f'{number}', 'kind': 'MachineError'}", FieldError, "data.train: 2"),
        ("{'errno': 28, 'message': f'full {number}', 'file': 'f'}", OSError, "28.*full 2"),
        ("{'fault': f'KeyError: {number}'}", RuntimeError, "KeyError: 2"),
        ("os.kill(os.getpid(), 9)", FullMemoryError, "lack of memory"),
        ("os._exit(7)", MachineError, "ended with code 7"),
    ],
)
@pytest.mark.slow
def test_first_bad_row_is_told_whatever_process_fails_first(
    tmp_path: Path, answer: Callable[[str], None], failure: str, kind: type[Exception], words: str
) -> None:
    slow = "time.sleep(0.2) if number == 2 else None"
    answer(f"answer = {{'part': 'x'}}; {slow}; answer = {failure} if number in (2, 3) else answer")
    with pytest.raises(kind, match=words):
        list(encode_in_processes(BATCHES, tmp_path, 2))
    assert not psutil.Process().children()


def test_process_that_does_not_start_is_done_without(
    tmp_path: Path, cache: Path, answer: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("sys.exit('no tokenizer')")
    (tmp_path / "errors.txt").write_text("no tokenizer")
    with pytest.raises(NoStartError):
        list(encode_in_processes(BATCHES, tmp_path, 2))
    monkeypatch.setattr(pool, "_error", lambda answer, folder: NoStartError())
    monkeypatch.setattr(build, "processes_for", lambda rows, least: 2)
    part = build.encode_rows(read_part(write(tmp_path), "train"), JOB)
    assert len(part.examples) + len(part.notes.dropped) == 23


def test_processes_that_encode_otherwise_are_not_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_part(write(tmp_path), "train")

    def encode_otherwise(batches: Any, folder: Path, count: int) -> Any:
        for batch in batches:
            number, start, end = batch
            table = encode_batch(rows[start:end][::-1], start, JOB)
            yield batch, write_part(table, next(cache.glob(".encoded-*.parts")), number)

    monkeypatch.setattr(build, "processes_for", lambda rows, least: 2)
    monkeypatch.setattr(build, "encode_in_processes", encode_otherwise)
    with monkeypatch.context() as stopped:  # before the batches are encoded anew
        stopped.setattr(build, "write_part", None)
        with pytest.raises(TypeError):
            build.encode_rows(rows, JOB)
    assert not list(cache.glob(".encoded-*.parts/*"))
    examples = build.encode_rows(rows, JOB).examples[:]
    monkeypatch.setattr("llmtune.data.store.rows.IN_MEMORY", 100)
    assert examples == build.encode_rows(rows, JOB).examples[:]


PARENT = """
import sys
from pathlib import Path
from llmtune.data.store import build, rows
from llmtune.data.store.read import read_part
from tests.data.test_store import JOB
from llmtune.recipe.data import Data
rows.IN_MEMORY, rows.BATCH_ROWS = 3, 20
build.processes_for = lambda rows, least: 2
build.encode_rows(read_part(Data(train=sys.argv[1], max_length=64), "train"), JOB)
"""


@pytest.mark.slow
def test_killed_encoding_leaves_no_process_and_goes_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(train=str(tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(4_000))), max_length=64)
    monkeypatch.setattr("llmtune.data.store.rows.BATCH_ROWS", 20)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(data.train)])
    deadline = time.monotonic() + 120
    while not (parts := list(cache.glob(".encoded-*.parts/*.arrow"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    parts = list(cache.glob(".encoded-*.parts/*.arrow"))
    assert 0 < len(parts) < 200
    rows = read_part(data, "train")
    build.encode_rows(rows, JOB)
    (file,) = encoded_files(cache)
    together = file.read_bytes()
    file.unlink()
    build.encode_rows(rows, JOB)
    assert file.read_bytes() == together
