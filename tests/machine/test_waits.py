"""How processes wait for each other: over gloo, for a day, beside NCCL."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from llmtune.machine import processes
from llmtune.training.distributed import join_processes


class GroupError(Exception):
    """Ends a test where a group of processes would be made."""


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate knows no processes yet, and none after the test."""
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    yield
    PartialState._reset_state()
    PartialState._shared_state.update(before)


def test_nccl_waits_for_a_day(fresh_state: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**options: Any) -> None:
        raise GroupError(options)

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(GroupError) as made:
        join_processes()
    assert made.value.args[0] == {"backend": "nccl", "timeout": timedelta(days=1)}


def test_processes_wait_over_gloo_beside_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, barriers = list[dict[str, Any]](), list[Any]()

    def make(**options: Any) -> str:
        groups.append(options)
        return f"gloo {len(groups)}"

    monkeypatch.setattr(processes, "_GROUPS", [])
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=object()))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", make)
    monkeypatch.setattr(dist, "barrier", lambda group: barriers.append(group))
    processes.join()
    processes.wait()
    with processes.ahead(True):
        assert barriers == ["gloo 1"]
    with processes.ahead(False):
        assert barriers == ["gloo 1"] * 3
    assert groups == [{"backend": "gloo", "timeout": timedelta(days=1)}]
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=object()))  # another training in the same Python
    processes.wait()
    assert barriers[-1] == "gloo 2"


def test_one_process_waits_for_nobody() -> None:
    processes.join()
    processes.wait()
    assert processes.gather("a") == processes.gather_on_first("a") == ["a"]
    assert processes.broadcast("a") == "a"
    assert processes.share([1, 2]) == [1, 2]
    assert processes.is_first_here()
    assert processes.here() == 1
