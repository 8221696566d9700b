"""Part D: two processes share the one card over gloo, which NCCL cannot; it checks where tensors are placed."""

import os
import socket
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.child import Job
from benchmarks.gpu.parts.agreement import relative_gap, tensor_gap
from benchmarks.gpu.report import Line, judged, undone

if TYPE_CHECKING:
    from benchmarks.gpu.children import Child
    from benchmarks.gpu.correct import Check

METHOD = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01}
LOSS, WEIGHTS = 1e-5, 1e-3
STEPS, BATCH = 4, 4


def prepare_and_train_alone(job: Job) -> Iterator[dict[str, Any]]:
    """Train a staged run in this process, and prepare the same run for two."""
    from benchmarks.gpu.runs import trains

    plain = trains.settings(
        trains.base_of(job),
        Path(job.arguments["rows"]),
        METHOD,
        job.device,
        model={"precision": "fp32"},
        train={"batch_size": BATCH, "max_steps": STEPS, "micro_batch_size": 2},
        memory={"frozen_blocks": "recompute"},
    )
    alone = trains.prepare_run(job.folder / "alone", plain, job.device)
    losses = trains.losses(trains.train_run(alone))
    plain["launch"] = {"accelerate": "multi_cpu" if job.device == "cpu" else "ddp", "processes": 2}
    trains.prepare_run(Path(job.arguments["run"]), plain, job.device)
    yield {"name": "alone", "losses": losses, "delta": trains.delta_file(alone)}


def start_two(check: "Check", arguments: dict[str, Any]) -> "list[Child]":
    """Start both processes on the same device, with the variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # On the one card both are local rank 0, which is the number of the card.
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LLMTUNE_WORLD": "2"}
    return [
        check.child(
            f"two-{rank}", "parts.two:train_beside", **arguments, **shared, RANK=str(rank),
            LOCAL_RANK=str(rank if check.device == "cpu" else 0),
            LOCAL_WORLD_SIZE=str(2 if check.device == "cpu" else 1),
        )
        for rank in range(2)
    ]  # fmt: skip


def train_beside(job: Job) -> Iterator[dict[str, Any]]:
    """Train the prepared run as one process of two."""
    import torch.distributed as dist

    from benchmarks.gpu.runs import trains
    from llmtune.run import Run

    begin_group = dist.init_process_group

    def begin_on_gloo(backend: str | None = None, **options: Any) -> None:
        begin_group(backend="gloo", **options)

    dist.init_process_group = begin_on_gloo  # type: ignore[assignment]
    run = Run(Path(job.arguments["run"]))
    log = trains.train_run(run)
    first = os.environ["RANK"] == "0"
    yield {"name": "beside", "losses": trains.losses(log), "delta": trains.delta_file(run) if first else None}


def compare_two(alone: dict[str, Any], answers: list[list[dict[str, Any]]]) -> Line:
    """The line on two processes beside one."""
    for answer in chain.from_iterable(answers):
        line = undone("D", answer)
        if line:
            return line
    both = answers[0][0]
    gap = relative_gap(both["losses"], alone["losses"])
    weights = tensor_gap(both["delta"], alone["delta"])
    text = f"staged, two processes over gloo: gap {gap:.0e} weights {weights:.0e}"
    return judged("D", text, gap <= LOSS and weights <= WEIGHTS, losses=both["losses"], alone=alone["losses"])
