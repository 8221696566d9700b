"""One run of the bench: what a cell trains on, and a tool that trains it in its own processes, with an empty cache."""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import ARMS, Shape, operations
from benchmarks.bases import find_base
from benchmarks.cells import TUNED, Cell, Work
from benchmarks.process import Measured, measure
from benchmarks.rows import MAX_LENGTH, in_order, joined_rows
from benchmarks.tools import llmtune
from benchmarks.tools.clock import RESULT
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.files import digest_of, read_json, write_json
from llmtune.launch.command import training_environment
from llmtune.machine.cores import count_cores
from llmtune.machine.gpus import VISIBLE
from llmtune.model.base import Base, build_skeleton
from llmtune.model.blocks import blocks
from llmtune.model.tokens import load_tokenizer, stop_ids

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contest:
    """What all tools are told: the base, the rows of an epoch as they are and encoded, and the precision."""

    cell: Cell
    work: Work
    base: Base
    shape: Shape
    precision: str

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The rows of an epoch as a data file holds them."""
        return joined_rows(self.cell.rows, self.work.batch * self.work.steps)

    @cached_property
    def examples(self) -> list[Example]:
        """The rows of an epoch, encoded as llmtune encodes them."""
        rows = [Row(row["id"], tuple(row["messages"]), row["id"]) for row in self.records]
        encoded = encode(rows, load_tokenizer(self.base), stop_ids(self.base), Rules(MAX_LENGTH, "drop"))
        if len(encoded.examples) != len(rows):
            raise SystemExit(f"{self.cell.name}: {self.base.name} makes rows of over {MAX_LENGTH} tokens of these")
        return encoded.examples

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures of a run, beside the code, the machine and the tool."""
        arm = ARMS[self.cell.arm]
        steps = {"batch": self.work.batch, "steps": self.work.steps, "precision": self.precision}
        contest = {"base": self.base.revision or self.base.folder.name, "rows": digest_of(self.records)[:12]}
        return {**steps, **contest, "method": arm.method, "epochs": arm.epochs, "quantize": arm.quantize}

    @property
    def tokens(self) -> int:
        """Tokens of all epochs."""
        return ARMS[self.cell.arm].epochs * sum(len(example.input_ids) for example in self.examples)

    @property
    def operations(self) -> float:
        """FLOPs that all epochs need, as `operations` counts them."""
        tokens = sum(len(example.input_ids) for example in self.examples)
        supervised = sum(example.supervised for example in self.examples)
        return operations(ARMS[self.cell.arm], self.shape, tokens, supervised)


def run_tool(contest: Contest, tool: str, interpreter: str, work_folder: Path) -> dict[str, Any]:
    """Let a tool train, and return its figures, or an `error` in one line."""
    rate = gemm_rate(torch.bfloat16 if contest.precision == "bf16" else torch.float32)
    work_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_folder, prefix="run-") as name:
        job = write_job(contest, tool, Path(name))
        command = command_of(tool, interpreter, job)
        settle_disk(contest.base.folder)
        taken = measure(command, environment(tool, Path(name)), Path(name))
        figures = {"gemm_gflops": rate / 1e9, "wall_s": taken.wall_s, "cpu_s": taken.cpu_s}
        if taken.code:
            return {**figures, "error": taken.error[:300]}
        return {**figures, **_figures(contest, tool, job, taken, rate)}


def settle_disk(folder: Path) -> None:
    """Bring the files of a base into memory and let the disk finish what runs before wrote: all tools start alike."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    os.sync()


def _figures(contest: Contest, tool: str, job: dict[str, Any], taken: Measured, rate: float) -> dict[str, Any]:
    folder = Path(job["folder"])
    told = llmtune.figures(job) if tool == "llmtune" else read_json(folder / RESULT)
    if len(told["losses"]) != job["steps"]:
        return {"error": f"trained {len(told['losses'])} steps of {job['steps']}"}
    steps = {"seconds_per_step": told["seconds"] / job["steps"], "tokens_per_s": contest.tokens / told["seconds"]}
    ends = {"first_loss": told["losses"][0], "last_loss": told["losses"][-1]}
    used = {"peak_rss_mb": taken.peak_rss_mb, "utilization": contest.operations / (told["seconds"] * rate)}
    return {"tokens": contest.tokens, **told, **steps, **ends, **used}


def write_job(contest: Contest, tool: str, folder: Path) -> dict[str, Any]:
    """Write what a tool trains to a folder: rows for llmtune, encoded rows in their order for others."""
    arm, work = ARMS[contest.cell.arm], contest.work
    job: dict[str, Any] = {
        "base": str(contest.base.folder),
        "arm": contest.cell.arm,
        "folder": str(folder),
        "batch": work.batch,
    }
    job |= {"steps": work.steps * arm.epochs, "precision": contest.precision, "tuned": tool.endswith(TUNED)}
    job |= {"rows": str(folder / "rows.jsonl"), "examples": str(folder / "examples.json")}
    Path(job["rows"]).write_text("".join(json.dumps(row) + "\n" for row in contest.records))
    write_json(Path(job["examples"]), in_order(contest.examples, work.batch, arm.epochs))
    write_json(folder / "job.json", job)
    return job


def command_of(tool: str, interpreter: str, job: dict[str, Any]) -> list[str]:
    """The command that starts a tool: llmtune's own, or the module that trains with another one."""
    if tool == "llmtune":
        return llmtune.command(interpreter, job)
    return [interpreter, "-m", f"benchmarks.tools.{tool.partition('-')[0]}", str(Path(job["folder"]) / "job.json")]


def environment(tool: str, folder: Path) -> dict[str, str]:
    """The environment of a tool: as many threads for each, and llmtune's own settings for those that are tuned."""
    cores = count_cores()
    tuned = tool.endswith(TUNED)
    plain = training_environment(1, cores) if tuned else {"OMP_NUM_THREADS": str(cores), **os.environ}
    own = {"LLMTUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), VISIBLE: "", "HF_HUB_OFFLINE": "1"}
    return {**plain, **own}


def gemm_rate(dtype: torch.dtype) -> float:
    """Measure the peak GEMM rate in FLOP/s: the fastest of a few square matrix multiplications in `dtype`."""
    best = 0.0
    for size in (1024, 2048):
        left, right = torch.randn(2, size, size, dtype=dtype)
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


@cache
def make_contest(cell: Cell, work: Work, model: str, precision: str, folder: Path) -> Contest:
    """The contest of a cell, whose base is written to the folder of models where it has random weights."""
    return Contest(cell, work, *_base_of(cell.size, model, folder), precision)


@cache
def _base_of(size: str, model: str, folder: Path) -> tuple[Base, Shape]:
    print(f"{size}: preparing the model", file=sys.stderr, flush=True)
    base = find_base(size, folder, model)
    skeleton = build_skeleton(base)
    block = sum(p.numel() for p in blocks(skeleton)[0].parameters() if p.ndim > 1)
    return base, Shape(len(blocks(skeleton)), block, skeleton.get_output_embeddings().weight.numel())
