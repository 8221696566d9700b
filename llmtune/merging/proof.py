"""Compares two models by their logits on the same texts, one of them read from disk in a fresh process."""

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llmtune.data.first_rows import first_rows
from llmtune.data.row import Row
from llmtune.errors import MachineError, ProofError
from llmtune.merging import compact
from llmtune.recipe.sections import Recipe
from llmtune.working import working

TEXTS = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "def area(radius):\n    return 3.14159 * radius**2",
    "Grüße aus Zürich, dépêche-toi, 你好 世界!",
)
TOKENS = 40
"""How many tokens at the end of a text the models read."""
_ROWS, _CHARACTERS = 3, 400
"""Rows of the data that are such texts too, and how much of each."""

STOCK = """
import json, sys, transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer
folder, tokens, out, texts, epsilon, dtype, auto = json.load(sys.stdin)
auto = getattr(transformers, auto)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
ids = [tokenizer(text).input_ids for text in texts]
batch = torch.zeros(len(ids), tokens, dtype=torch.long)
for row, one in zip(batch, ids):
    row[:len(one[-tokens:])] = torch.tensor(one[-tokens:])
mask = torch.arange(tokens) < torch.tensor([[len(one)] for one in ids])
def load(dtype):
    return auto.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True)
def jitter(number, weight):
    torch.manual_seed(number)
    weight = torch.atleast_1d(weight)
    for part in weight.split(max(1, 2**20 * len(weight) // max(1, weight.numel()))):
        half = torch.exp2(torch.frexp(part).exponent) * epsilon / 4 * (part != 0)
        part += half * (2 * torch.rand_like(part) - 1)
def compute(model, change=None):
    with torch.inference_mode(), in_fp32(model, change):
        return model(input_ids=batch, attention_mask=mask.long()).logits[mask]
model, loading = load(getattr(torch, dtype))
model.eval()
try:
    logits = {"stored": compute(widen_buffers(model, auto))}
except (RuntimeError, KeyError):  # a model whose blocks read weights of other blocks
    model = load(torch.float32)[0].eval()
    logits = {"stored": compute(model)}
if epsilon:
    logits["jittered"] = compute(model, jitter)
save_file(logits, out)
mismatched = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
print(json.dumps({"ids": ids, "template": tokenizer.chat_template, "mismatched": mismatched,
    "name": type(model).__name__}))
"""


@dataclass(frozen=True)
class Reloaded:
    """What stock transformers reads from a folder: class, token ids, template, missing or unexpected tensors, logits.

    `rounding` is how far the logits move when every weight changes at random by less than its rounding error.
    """

    name: str
    ids: list[list[int]]
    template: str | None
    mismatched: list[str]
    logits: torch.Tensor
    rounding: float


def probes(settings: Recipe) -> list[str]:
    """Return the texts that models are compared on: fixed ones, and three rows of the data if it can be read."""
    parts = (first_rows(settings.data, part, _ROWS)[:_ROWS] for part in ("test", "eval", "train"))
    rows = next(filter(None, parts), [])
    return [*TEXTS, *(_text(row)[-_CHARACTERS:] for row in rows)]


def _text(row: Row) -> str:
    """Return a row as one text; a conversation as JSON, whatever its turns hold."""
    return row.text or json.dumps(row.messages, ensure_ascii=False)


def logits(model: PreTrainedModel | PeftModel, ids: list[list[int]]) -> torch.Tensor:
    """Return fp32 logits at the last 40 tokens of each text, on the CPU: (tokens of all texts, vocabulary)."""
    rows = [torch.tensor(text[-TOKENS:]) for text in ids]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(batch.shape[1]) < torch.tensor([[len(row)] for row in rows])
    with torch.inference_mode():
        output = model(input_ids=batch.to(model.device), attention_mask=mask.long().to(model.device))
    return torch.as_tensor(output.logits).float().cpu()[mask]


def within(what: str, actual: torch.Tensor, expected: torch.Tensor, bound: float) -> float:
    """Return the largest gap between two sets of logits; raises ProofError over the bound."""
    gap = float((actual - expected).abs().max())
    if not gap <= bound:
        raise ProofError(f"{what} moved logits by {gap:.3g}, over the bound of {bound:.3g}; nothing was merged")
    return gap


def load_with_stock_transformers(folder: Path, texts: list[str], dtype: torch.dtype, auto: str) -> Reloaded:
    """Read a folder with stock transformers, offline, in a fresh process elsewhere; raises ProofError if it cannot.

    `auto` names the class of transformers that loads it.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        out = Path(elsewhere) / "logits.safetensors"
        epsilon = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        name = str(dtype).removeprefix("torch.")
        task = json.dumps([str(folder.absolute()), TOKENS, str(out), texts, epsilon, name, auto])
        script = inspect.getsource(compact) + STOCK
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with working("reading the merged folder with stock transformers in a fresh process"):
            child = subprocess.run(
                [sys.executable, "-c", script], input=task, capture_output=True, text=True, cwd=elsewhere, env=env
            )
        if child.returncode == -signal.SIGKILL:
            raise MachineError(f"{folder}: the process that reads the merged folder was killed; was memory full?")
        if child.returncode:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise ProofError(f"stock transformers cannot load the merged folder: {last}")
        answer, tensors = json.loads(child.stdout.splitlines()[-1]), load_file(out)
        rounding = float((tensors.get("jittered", tensors["stored"]) - tensors["stored"]).abs().max())
        return Reloaded(
            answer["name"], answer["ids"], answer["template"], answer["mismatched"], tensors["stored"], rounding
        )
