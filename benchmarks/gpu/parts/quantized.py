"""Part Q: a 4-bit base on the device, against the same base with its weights dequantized."""

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.budget import do_items
from benchmarks.gpu.child import Job
from benchmarks.gpu.parts.agreement import ADAPTERS, METHODS
from benchmarks.gpu.runs import trains
from llmtune.adapters.delta import load_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.cli.chat import chat
from llmtune.model.base import Base, build_skeleton, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.model.quantize import split_linear_layers
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, open_run
from llmtune.run_log import read_log

LOSS, COSINE, TOKENS = 1e-2, 0.999, 16
SAME_TOKENS = 14


def parts(job: Job) -> Iterator[dict[str, Any]]:
    """LoRA on a 4-bit base, and top blocks over 4-bit ones: trained, compared, generated from; then a chat."""
    methods = {"lora": {**METHODS["full"], "adapter": ADAPTERS["lora"]}, "frozen": METHODS["frozen"]}
    items = [(name, partial(compare, job, name, method)) for name, method in methods.items()]
    items.append(("chat", partial(answer, job)))
    yield from do_items(items, job.budget, job.clean)


def train_4bit(job: Job, name: str, method: dict[str, Any]) -> Run:
    """Train three steps on the 4-bit base."""
    plain = trains.settings(
        trains.base_of(job),
        Path(job.arguments["rows"]),
        method,
        job.device,
        model={"precision": "fp32", "quantize": "4bit"},
        train={"batch_size": 4, "max_steps": 3},
    )
    run = trains.prepare_run(job.folder / f"4bit-{name}", plain, job.device)
    trains.train_run(run)
    return run


def compare(job: Job, name: str, method: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradients and greedy tokens of the trained run, in 4 bits and dequantized."""
    run = train_4bit(job, name, method)
    recipe, base = run.recipe(), locate_base(run.recipe().model)
    quantized, plain = (pass_over(job, run, recipe, base, dequantize=back) for back in (False, True))
    gap = abs(quantized["loss"] - plain["loss"])
    cosine = float(torch.nn.functional.cosine_similarity(quantized["gradient"], plain["gradient"], dim=0))
    same = sum(one == other for one, other in zip(quantized["tokens"], plain["tokens"], strict=False))
    passes = gap <= LOSS and cosine >= COSINE and same >= SAME_TOKENS
    text = f"{name} on 4 bits: loss gap {gap:.0e} grad cosine {cosine:.5f} tokens {same}/{TOKENS}"
    facts = {"losses": trains.losses(read_log(run.log_file)), "gap": gap, "cosine": cosine, "same": same}
    return {"text": text, "status": "PASS" if passes else "FAIL", **facts}


def pass_over(job: Job, run: Run, recipe: Recipe, base: Base, dequantize: bool) -> dict[str, Any]:
    """Loss and gradient on one row, and greedy tokens, of the tuned model with its base in 4 bits or dequantized."""
    skeleton = build_skeleton(base)
    plan = recipe.plan(model_facts(skeleton))
    _, keep = split_linear_layers(skeleton, plan, not recipe.method.adapter.trains_base)
    weights: Any = load_model(base, torch.float32, keep)
    if dequantize:
        weights = weights.dequantize().float()
    tuned: Any = load_delta(weights.to(job.device), run.delta)
    # An adapter that is loaded to be used requires no gradient; the tensors are the ones of a fresh one.
    names = set(trained_tensors(insert(skeleton, recipe.method.adapter, plan, base), plan))
    for key, parameter in tuned.named_parameters():
        parameter.requires_grad_(key in names)
    ids = torch.arange(20, 60, device=job.device)[None]
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad.flatten().float().cpu() for p in tuned.parameters() if p.grad is not None]
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        tokens = tuned.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
    return {
        "loss": float(loss),
        "gradient": torch.cat(gradients),
        "tokens": tokens[0, ids.shape[1] :].tolist(),
    }


def answer(job: Job) -> dict[str, Any]:
    """What chat answers from the trained 4-bit run."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        chat(open_run(job.folder / "4bit-lora"), ["/set max_new_tokens=8", "play some jazz", "/quit"])
    size = len(screen.getvalue())
    return {"text": f"chat on the 4-bit run answers ({size} characters)", "status": "PASS" if size > 100 else "FAIL"}
