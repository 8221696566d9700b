"""How many cores a process may use, on systems that tell it and on others."""

import os

import pytest

from llmtune.machine.cores import count_cores
from tests.support import ROOT


def test_counts_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5}, raising=False)
    assert count_cores() == 3


@pytest.mark.parametrize(("cores", "counted"), [(6, 6), (None, 1)])
def test_counts_all_cores_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, counted: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert count_cores() == counted


def test_no_other_module_asks_the_system() -> None:
    files = [file for folder in ("llmtune", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    asking = [file.relative_to(ROOT) for file in files if "sched_getaffinity" in file.read_text()]
    assert [str(file) for file in asking] == ["llmtune/machine/cores.py"]
