"""Tiny random models and a byte-level tokenizer; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.runs.models import CHATML, SPECIAL, tokenizer

__all__ = ["CHATML", "tokenizer"]
LARGEST_KEPT = 4 * 2**20
_BASES: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}
"""The files of each base that this process has made, and the state in which that left the generator of numbers."""


def config(kind: str = "llama", blocks: int = 2, hidden: int = 32, tied: bool = True, **more: Any) -> Any:
    """A small configuration of a model type of transformers."""
    size = {
        "vocab_size": len(SPECIAL) + 256,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
    }
    size |= {"intermediate_size": 2 * hidden, "max_position_embeddings": 512, "tie_word_embeddings": tied}
    size |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind in ("llama", "qwen3", "gemma3_text", "gemma2", "mixtral", "mistral"):
        size |= {"num_key_value_heads": 2, "head_dim": hidden // 4}
    return AutoConfig.for_model(kind, **{**size, **more})


def model(kind: str = "llama", seed: int = 0, **more: Any) -> Any:
    """A randomly initialised fp32 model."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind, **more), dtype=torch.float32)


def save_base(folder: Path, kind: str = "llama", seed: int = 0, **more: Any) -> Path:
    """Write a base model's folder like one from the Hub: safetensors, tokenizer, template, generation config."""
    key = repr((kind, seed, sorted(more.items())))
    made_here = not (folder.exists() and any(folder.iterdir()))
    if made_here and key in _BASES:
        files, random_state = _BASES[key]
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        torch.set_rng_state(random_state)
        return folder
    base = model(kind, seed, **more)
    base.generation_config.eos_token_id = 2
    base.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if made_here and sum(file.stat().st_size for file in folder.iterdir()) < LARGEST_KEPT:
        _BASES[key] = {file.name: file.read_bytes() for file in folder.iterdir()}, torch.get_rng_state()
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompt/completion rows of different lengths."""
    return [
        {"id": f"sum-{n}", "prompt": f"{n} plus {n % 7}?", "completion": str(n + n % 7) + "!" * (n % 3)}
        for n in range(start, start + count)
    ]


def write_recipe(path: Path, base: Path, rows: Path, method: dict[str, Any] | None = None, **sections: Any) -> Path:
    """Write a recipe file (JSON is YAML) for a tiny base; `sections` are added or replace whole sections."""
    recipe = {
        "model": {"base": str(base), "precision": "fp32"},
        "data": {"train": str(rows), "eval_fraction": 0.2},
        "method": method or {"kind": "full", "lr": 0.01},
        "train": {"epochs": 1, "batch_size": 4},
        "eval": {"suite": "none"},
        **sections,
    }
    recipe["eval"] = {"forgetting": False, **recipe["eval"]}  # the tests of it turn it on: 260 requests a model
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path
