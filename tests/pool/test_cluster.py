"""Tasks on a Ray cluster: a lost worker's runs again, a stopped one saves first, and a cluster that is not there."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from llmtune.errors import MachineError
from llmtune.pool import open_pool, remote
from llmtune.pool.cluster import Cluster
from llmtune.pool.task import Task
from tests.support import ROOT


@pytest.mark.slow
def test_cluster_runs_a_lost_workers_task_again(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # Ray's sockets take no long paths
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV", "RAY_"))}
        env = {**kept, "PYTHONPATH": f"{ROOT}:{tmp_path}", "RAY_TMPDIR": short}
        words = [sys.executable, "-m", "tests.support.ray_cluster", str(tmp_path)]
        ran = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(ran.stdout) == {
        "ends": [["done", 0, ""], ["fails", 4, "the loss is not finite"], ["lost", 0, ""]],
        "width": 2,
        "stopped": 130,
        "saved": True,
    }
    assert (tmp_path / "arms" / "lost" / "log.txt").read_text() == "once\nagain\n"
    assert "llmtune: note: lost: its worker was lost: WorkerCrashedError; it runs again\n" in ran.stderr
    assert not list(tmp_path.glob(".shared-*"))


def test_says_how_a_cluster_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(MachineError, match=rf"no Ray cluster answers at RAY_ADDRESS={address} .*ray start --head"):
            open_pool("ray", tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MachineError, match=r'pip install "llmtune\[ray\]"'):
        open_pool("ray", tmp_path)


def test_machine_with_another_disk_says_so(tmp_path: Path) -> None:
    code, message = remote.run_process([], "log.txt", str(tmp_path), str(tmp_path / "out" / ".shared-1"), 1, 0)
    assert (code, message.partition(" has no ")[2]) == (
        3,
        f"{tmp_path / 'out'}; give an --out on a disk that all machines share",
    )


class Machines(ModuleType):
    """What a cluster tells of its machines."""

    def __init__(self, *resources: dict[str, float]) -> None:
        super().__init__("ray")
        self._resources = resources

    def nodes(self) -> list[dict[str, object]]:
        """One entry a machine, as Ray gives them."""
        return [{"Alive": True, "Resources": each} for each in self._resources]


def test_all_tasks_of_a_cluster_get_the_same(tmp_path: Path) -> None:
    eight, two, head = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}
    pool = Cluster(tmp_path, Machines(eight, two, head))
    assert (pool.share(0), pool.share(2), pool.share(4)) == ((1, 4), (2, 8), (4, 32))
    assert (pool.width(), pool.width(2), pool.width(4)) == (10, 5, 2)
    with pytest.raises(MachineError, match="a needs 16 GPUs and no machine of the cluster has over 8"):
        pool.run([Task("a", "stub", (), gpus=16)], lambda end: None)
    cpus = Cluster(tmp_path, Machines({"CPU": 16.0}, {"CPU": 8.0}, {}))
    assert (cpus.share(1), cpus.width()) == ((0, 8), 3)
