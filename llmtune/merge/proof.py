"""Whether two models are the same: their logits on the same texts, one of them read from disk in a fresh process."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmtune.errors import ProofError
from llmtune.recipe.sections import Recipe

TEXTS = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "def area(radius):\n    return 3.14159 * radius**2",
    "Grüße aus Zürich, dépêche-toi, 你好 世界!",
)
TOKENS = 40
"""Tokens of a text that the models see: its last ones."""

STOCK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, out, texts, grain = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model, loading = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True)
ids = [tokenizer(text).input_ids for text in texts]
batch = torch.zeros(len(ids), tokens, dtype=torch.long)
for row, one in zip(batch, ids):
    row[:len(one[-tokens:])] = torch.tensor(one[-tokens:])
mask = torch.arange(tokens) < torch.tensor([[len(one)] for one in ids])
made = {}
with torch.inference_mode():
    made["logits"] = model.eval()(input_ids=batch, attention_mask=mask.long()).logits[mask]
    if grain:
        torch.manual_seed(0)
        for weight in model.parameters():
            half = torch.exp2(torch.frexp(weight).exponent) * grain / 4 * (weight != 0)
            weight += half * (2 * torch.rand_like(weight) - 1)
        made["jittered"] = model(input_ids=batch, attention_mask=mask.long()).logits[mask]
save_file(made, out)
odd = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
print(json.dumps({"ids": ids, "template": tokenizer.chat_template, "odd": odd}))
"""


@dataclass(frozen=True)
class Reloaded:
    """What stock transformers made of a folder: token ids, chat template, tensors that did not match, logits.

    `rounding` is how far the logits move where every weight moves at random by less than it is rounded by.
    """

    ids: list[list[int]]
    template: str | None
    odd: list[str]
    logits: torch.Tensor
    rounding: float


def probes(settings: Recipe) -> list[str]:
    """The texts that models are compared on: fixed ones, and lines of the run's data where it still is a text file."""
    sources = [Path(source) for source in (settings.data.test, settings.data.eval, settings.data.train) if source]
    found = [source for source in sources if source.suffix in (".jsonl", ".csv") and source.is_file()]
    if not found:
        return list(TEXTS)
    with found[0].open(encoding="utf-8", errors="replace") as lines:
        return [*TEXTS, *(line.strip()[-400:] for line, _ in zip(lines, range(3), strict=False) if line.strip())]


def logits(weights: Any, ids: list[list[int]]) -> torch.Tensor:
    """The fp32 logits at the last 40 tokens of each text, on the CPU: (tokens of all texts, vocabulary)."""
    kept = [torch.tensor(one[-TOKENS:]) for one in ids]
    batch = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
    mask = torch.arange(batch.shape[1]) < torch.tensor([[len(one)] for one in kept])
    with torch.inference_mode():
        found = weights(input_ids=batch.to(weights.device), attention_mask=mask.long().to(weights.device)).logits
    return found.float().cpu()[mask]


def within(what: str, found: torch.Tensor, expected: torch.Tensor, bound: float) -> float:
    """The largest gap between two sets of logits; raises ProofError over the bound."""
    gap = float((found - expected).abs().max())
    if not gap <= bound:
        raise ProofError(f"{what} moved logits by {gap:.3g}, over the bound of {bound:.3g}; nothing is called merged")
    return gap


def load_with_stock_transformers(folder: Path, texts: list[str], dtype: torch.dtype) -> Reloaded:
    """A folder as stock transformers reads it, offline, in a fresh process that works elsewhere; raises ProofError."""
    with tempfile.TemporaryDirectory() as elsewhere:
        out = Path(elsewhere) / "logits.safetensors"
        grain = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        given = json.dumps([str(folder.absolute()), TOKENS, str(out), texts, grain])
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        child = subprocess.run(
            [sys.executable, "-c", STOCK], input=given, capture_output=True, text=True, cwd=elsewhere, env=env
        )
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise ProofError(f"stock transformers cannot load the merged folder: {last}")
        said = json.loads(child.stdout.splitlines()[-1])
        found = load_file(out)
        rounding = float((found.get("jittered", found["logits"]) - found["logits"]).abs().max())
        return Reloaded(said["ids"], said["template"], said["odd"], found["logits"], rounding)
