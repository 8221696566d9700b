"""Compares two models by their logits on the same texts, one of them read from disk in a fresh process."""

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
from llmtune.machine.exits import ending_signal, exit_words
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
_SIGN, _EXPONENT, _BITS = -(2**31), 0x7F800000, torch.arange(32, dtype=torch.int32)
"""The sign and the exponent in the bits of an fp32 number, and the numbers of all bits."""
_PIECE = 2**18
"""Numbers that are changed at once."""

_IMPORTS = """
import gc
gc.disable()
from transformers import AutoModelForCausalLM
gc.freeze()
gc.enable()
"""
"""Imports in which no garbage is looked for, then or when the process ends: that takes longer than the rest of both."""
STOCK = """
import json, shutil, sys, torch, transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer
folder, tokens, out, texts, auto = json.load(sys.stdin)
auto, away = getattr(transformers, auto), folder + "/offloaded"
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
ids = [tokenizer(text).input_ids for text in texts]
batch = torch.zeros(len(ids), tokens, dtype=torch.long)
for row, one in zip(batch, ids):
    row[:len(one[-tokens:])] = torch.tensor(one[-tokens:])
mask = torch.arange(tokens) < torch.tensor([[len(one)] for one in ids])
def load(**options):
    return auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
        output_loading_info=True, **options)
def compute(model):
    with torch.inference_mode():
        return model.eval()(input_ids=batch, attention_mask=mask.long()).logits[mask].float()
try:  # each layer is read when it runs
    model, loading = load(device_map={"": "disk"}, offload_folder=away)
    logits = compute(model)
except (RuntimeError, KeyError, ValueError, AttributeError):  # a model that reads weights of one layer in another
    model, loading = load()
    logits = compute(model)
shutil.rmtree(away, ignore_errors=True)
save_file({"logits": logits}, out)
reshaped = {key[0] for key in loading["mismatched_keys"]}
mismatched = sorted({*loading["missing_keys"], *loading["unexpected_keys"], *reshaped})
print(json.dumps({"ids": ids, "template": tokenizer.chat_template, "mismatched": mismatched,
    "name": type(model).__name__}))
"""


@dataclass(frozen=True)
class Reloaded:
    """What stock transformers reads from a folder: class, token ids, template, tensors that do not fit, logits."""

    name: str
    ids: list[list[int]]
    template: str | None
    mismatched: list[str]
    logits: torch.Tensor


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


def jitter(number: int, weight: torch.Tensor, epsilon: float) -> None:
    """Change each number of an fp32 weight in place, up or down at random, by less than what rounding it may change.

    The step is half of the number's last place in its dtype over the square root of 3: what rounding errors, spread
    evenly up to half of it, are on the root mean square. `number` is the weight's in its model, which makes the
    changes the same each time; `epsilon` is that of its dtype.
    """
    generator = torch.Generator().manual_seed(number)
    rows = weight if weight.dim() else weight[None]
    for part in torch.split(rows, max(1, _PIECE * len(rows) // max(1, rows.numel()))):
        bits = torch.empty(-(-part.numel() // 32), dtype=torch.int32)
        bits.random_(-(2**31), 2**31, generator=generator)
        signs = ((bits << _BITS[:, None]) & _SIGN).view(-1)[: part.numel()].view(part.shape)
        powers = part.view(torch.int32) & _EXPONENT  # the number's power of two: what its last place is a share of
        part.add_((powers | signs).view(torch.float32), alpha=epsilon / 2 / 3**0.5)


def load_with_stock_transformers(folder: Path, texts: list[str], auto: str) -> Reloaded:
    """Read a folder with stock transformers, offline, in a fresh process elsewhere; raises ProofError if it cannot.

    `auto` names the class of transformers that loads it. It computes in fp32, with one layer in memory at a time where
    the model allows it.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        out = Path(elsewhere) / "logits.safetensors"
        task = json.dumps([str(folder.absolute()), TOKENS, str(out), texts, auto])
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with working("reading the merged folder with stock transformers in a fresh process"):
            child = subprocess.run(
                [sys.executable, "-c", _IMPORTS + STOCK],
                input=task,
                capture_output=True,
                text=True,
                cwd=elsewhere,
                env=env,
            )
        ended = exit_words(child.returncode)
        if ending_signal(child.returncode) == signal.SIGKILL:
            raise MachineError(f"{folder}: the process that reads the merged folder {ended}")
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [f"its process {ended}"])[-1]
            raise ProofError(f"stock transformers cannot load the merged folder: {last}")
        answer = json.loads(child.stdout.splitlines()[-1])
        computed = load_file(out)["logits"]
        return Reloaded(answer["name"], answer["ids"], answer["template"], answer["mismatched"], computed)
