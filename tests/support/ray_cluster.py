"""A Ray cluster of two machines that are processes of this one, and a pool on it; prints what came of its tasks."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.errors import Interrupted
from llmtune.pool import Task, open_pool
from llmtune.pool.cluster import SETTINGS

STUB = """
import os, signal, sys, time
from pathlib import Path
from llmtune.launch.parent import follow_parent
follow_parent()
folder, how = Path(sys.argv[1]), sys.argv[2]
def save(*_):
    (folder / (how + "-saved")).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
here = folder / how
again = here.exists()
here.write_text(os.environ["LLMTUNE_PARENT"] + " " + os.environ["OMP_NUM_THREADS"])
print("again" if again else "once")
if how == "fails":
    Path(os.environ["LLMTUNE_EXIT_FILE"]).write_text("4" + chr(10) + "the loss is not finite")
    sys.exit(4)
if how == "long" or how == "lost" and not again:
    time.sleep(60)
"""


def when(file: Path, action: Callable[[int], None]) -> None:
    """In a thread, once a stub has started, do something with the process id of its worker."""

    def wait() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.05)
        action(int(file.read_text().split()[0]))

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> dict[str, Any]:
    """Run tasks on the cluster: one that is done, one that fails, one whose worker is killed, one that is stopped."""
    (folder / "stub.py").write_text(STUB)
    (Path(os.environ["RAY_TMPDIR"]) / "ray").mkdir()
    os.environ.update(SETTINGS)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False})
    try:
        cluster.add_node()
        os.environ["RAY_ADDRESS"] = cluster.address
        pool, ends = open_pool("ray", folder), list[tuple[str, int, str]]()
        tasks = [Task(how, "stub", (".", how)) for how in ("done", "fails", "lost")]
        when(folder / "lost", lambda worker: os.kill(worker, signal.SIGKILL))
        pool.run(tasks, lambda end: ends.append((end.task.name, end.code, end.message)))
        when(folder / "long", lambda _: os.kill(os.getpid(), signal.SIGINT))
        stopped = 0
        try:
            pool.run([Task("long", "stub", (".", "long"))], lambda end: ends.append((end.task.name, end.code, "")))
        except Interrupted as error:
            stopped = error.exit_code
        return {
            "ends": sorted(ends),
            "width": pool.width(),
            "stopped": stopped,
            "saved": (folder / "long-saved").exists(),
        }
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    print(json.dumps(main(Path(sys.argv[1]))))
