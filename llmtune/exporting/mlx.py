"""MLX: mlx-lm's own converter on the merged weights, which mlx-lm then reads again in a fresh process."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llmtune.errors import MachineError, ProofError, RecipeError
from llmtune.evaluation.questions import context_length
from llmtune.exporting.forms import Export
from llmtune.exporting.room import check_room
from llmtune.exporting.rows import Prompts, answers, prompts_of
from llmtune.machine.exits import ending_signal, exit_words
from llmtune.merging.checks import disk_bytes
from llmtune.merging.outcome import fp32_bound, largest_gap
from llmtune.merging.proof import TOKENS, logits, probes
from llmtune.model.base import Base, load_config, load_model
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.numbers import count
from llmtune.working import working

_INSTALL = "pip install mlx-lm; on Linux pip install mlx-lm 'mlx[cpu]'"
_SHOWN = 80

CONVERT = """
import json, sys
from mlx_lm import convert
source, target = json.load(sys.stdin)
convert(source, mlx_path=target)
"""
READ = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
folder, out, texts, prompts, stop, room = json.load(sys.stdin)
model, tokenizer = load(folder)
model.set_dtype(mx.float32)
mx.save_safetensors(out, {str(number): model(mx.array([ids]))[0] for number, ids in enumerate(texts)})
def answer(ids):
    tokens = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=room):
        if int(token) in stop:
            break
        tokens.append(int(token))
    return tokens
print(json.dumps({"answers": [answer(ids) for ids in prompts], "template": tokenizer.chat_template,
    "stop": sorted(tokenizer.eos_token_ids)}))
"""


def check(export: Export) -> None:
    """Raise MachineError where mlx-lm, or what it runs on, is missing, and for too little room."""
    if find_spec("mlx_lm") is None:
        raise MachineError(f"--to mlx: needs mlx-lm, which is not installed; {_INSTALL}")
    if find_spec("mlx") is None:
        raise MachineError(f"--to mlx: mlx-lm is here without mlx; {_INSTALL}")
    settings = export.run.recipe()
    base = locate_base(settings.model)
    check_room(export, base, disk_bytes(base, settings.merge.dtype))


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write what mlx-lm's converter makes of the merged weights; returns its version.

    Raises RecipeError for a type of model that mlx-lm does not know.
    """
    merged = export.merged()
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        target = Path(inside) / "mlx"
        _run(CONVERT, [str(merged.absolute()), str(target)], "converting to MLX", merged)
        for file in target.iterdir():
            file.rename(folder / file.name)
    return {"mlx_lm": version("mlx-lm")}


def prove(export: Export, folder: Path) -> dict[str, Any]:
    """Return the facts of the proof: logits and greedy answers of mlx-lm and of transformers, both in fp32.

    Raises ProofError where logits differ by more than the bound, or answers, template or stop tokens differ.
    """
    settings = export.run.recipe()
    base, merged = locate_base(settings.model), Base(export.run.merged, str(export.run.merged), None, None)
    tokenizer, stop = load_tokenizer(merged), stop_ids(base)
    texts = [tokenizer(text).input_ids[-TOKENS:] for text in probes(settings)]
    prompts = prompts_of(settings, tokenizer, stop, context_length(load_config(merged)))
    model = load_model(merged)
    expected, ours = logits(model, texts), answers(model, prompts, "the merged model")
    with tempfile.TemporaryDirectory() as elsewhere:
        out = Path(elsewhere) / "logits.safetensors"
        task = [str(folder.absolute()), str(out), texts, prompts.ids, sorted(stop), prompts.new_tokens]
        read = _run(READ, task, "reading the folder with mlx-lm", folder)
        tensors = load_file(out)
    actual = torch.cat([tensors[str(number)] for number in range(len(texts))])
    if read["template"] != tokenizer.chat_template:
        raise ProofError("mlx-lm reads another chat template than the merged model's; nothing was exported")
    if not stop <= set(read["stop"]):
        raise ProofError(
            f"mlx-lm ends answers at tokens {read['stop']}, the model at {sorted(stop)}; nothing was exported"
        )
    bound, gap = fp32_bound(expected), largest_gap(actual, expected)  # both compute in fp32, in another order
    if not gap <= bound:
        raise ProofError(f"mlx-lm's logits differ by {gap:.3g}, over the bound of {bound:.3g}; nothing was exported")
    facts = {"gap": gap, "bound": bound, "texts": len(texts)}
    return facts | _compared(model, prompts, ours, read["answers"], bound)


def summary(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Return what was written and proved, and how to use it."""
    return [
        f"mlx     {folder}: largest logit gap {facts['gap']:.2g} (bound {facts['bound']:.2g}), "
        f"{facts['equal']} of {count(facts['rows'])} greedy answers the same",
        f"        mlx_lm.chat --model {folder}",
        f"        in 4 bits, without this proof: mlx_lm.convert --hf-path {folder} -q --mlx-path NEW",
    ]


def _compared(
    model: PreTrainedModel, prompts: Prompts, ours: list[list[int]], theirs: list[list[int]], bound: float
) -> dict[str, Any]:
    """Return how many answers are the same; raises ProofError where one parts from the model's without a tie."""
    ours = [[token for token in answer if token not in prompts.stop] for answer in ours]
    equal = 0
    for row, (prompt, one, other) in enumerate(zip(prompts.ids, ours, theirs, strict=True), 1):
        equal += one == other
        if one != other and not _is_tie(model, [*prompt], one, other, bound):
            raise ProofError(
                f"mlx-lm answers row {row} by tokens {str(other)[:_SHOWN]}, the merged model by {str(one)[:_SHOWN]}; "
                "nothing was exported"
            )
    return {"rows": len(ours), "equal": equal}


def _is_tie(model: PreTrainedModel, prompt: list[int], one: list[int], other: list[int], bound: float) -> bool:
    """Whether the model finds the tokens at which two answers part likely to within twice the bound."""
    place = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if place is None:  # one of them ended
        return False
    with torch.inference_mode():
        last = model(input_ids=torch.tensor([[*prompt, *one[:place]]])).logits[0, -1].float()
    return float(last[one[place]] - last[other[place]]) <= 2 * bound


def _run(script: str, task: list[Any], name: str, folder: Path) -> dict[str, Any]:
    """Run a script of mlx-lm in a process of its own, offline; returns the JSON object in its last line, if any.

    Raises RecipeError for a type of model that it does not know, ProofError for what else ends it.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with working(name):
        child = subprocess.run(
            [sys.executable, "-c", script], input=json.dumps(task), capture_output=True, text=True, env=environment
        )
    ended = exit_words(child.returncode)
    if ending_signal(child.returncode) == signal.SIGKILL:
        raise MachineError(f"{name}: its process {ended}")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"its process {ended}"])[-1]
        if unknown := re.search(r"Model type (\S+) not supported", child.stderr):
            raise RecipeError(f"--to mlx: mlx-lm {version('mlx-lm')} knows no models of type {unknown[1]}")
        raise ProofError(f"{name} failed on {folder}: {last}")
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}
