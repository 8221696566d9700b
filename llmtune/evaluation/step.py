"""evaluate(run): base and tuned model on the same questions under the same settings, with everything to repeat it."""

import importlib.metadata
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapters.delta import load_delta
from llmtune.data.gate import gate
from llmtune.data.template import template_sha256
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.harness import quiet, score_tasks
from llmtune.evaluation.held_out import FEW_SHOT_SEED, HeldOut, Questions, answer_limit, questions, worked_examples
from llmtune.evaluation.metrics import score
from llmtune.evaluation.results import (
    FEW_SHOT,
    Answer,
    Answers,
    Evaluation,
    Evaluations,
    Result,
    differences,
    task_title,
)
from llmtune.evaluation.tasks import load_tasks
from llmtune.files import digest_of, fingerprint, write_json
from llmtune.model.base import Base, computes_bf16, load_model, load_tokenizer, locate_base, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT, Suite, check_rows, load_suite
from llmtune.run import Run, locates_mistakes

PACKAGES = ("llmtune", "lm_eval", "torch", "transformers", "tokenizers", "peft", "datasets")


@dataclass(frozen=True)
class _Exam:
    """What both models are asked, and how."""

    suite: Suite
    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    held_out: dict[str, Questions]
    """The held-out rows, zero-shot and few-shot, by the task's name."""
    tasks: list[Task]
    limit: int | None
    new_tokens: int
    """Tokens that an answer to a held-out row may have."""


@locates_mistakes
def evaluate(run: Run) -> Evaluations:
    """Evaluate base and tuned model on the recipe's suite; writes eval/base.json, tuned.json and settings.json.

    Raises RecipeError for a bad suite, MachineError where a task's rows cannot be had, ProofError for a changed delta.
    """
    recipe = run.recipe()
    suite = load_suite(recipe.eval.suite)
    delta = {Path(name).name: facts["sha256"] for name, facts in run.verify("train").items()}
    tasks = load_tasks(suite)
    base = locate_base(recipe.model)
    model = load_model(base, torch.bfloat16 if computes_bf16(recipe.model.precision) else torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    exam = _exam(recipe, suite, tasks, model, base)
    settings = _settings(recipe, exam, model)
    weights = {file.name: fingerprint(file)["sha256"] for file in sorted(base.folder.glob("*.safetensors"))}
    origin = {"name": base.name, "revision": base.revision, "hub_id": base.hub_id, "weights": weights}
    before: Evaluation = {"model": "base", "base": origin, "delta": None, "settings": settings, **_ask(exam, model)}
    answers = _ask(exam, _tuned(model, run), is_tuned=True)
    after: Evaluation = {"model": "tuned", "base": origin, "delta": delta, "settings": settings, **answers}
    configs = {task.task_name: json.loads(json.dumps(task.dump_config(), default=str)) for task in tasks}
    stored: Evaluations = {
        "base": before,
        "tuned": {**after, "differences": differences(after, before)},
        "settings": settings | {"base": origin, "delta": delta, "configs": configs},
    }
    for name, value in stored.items():
        write_json(run.eval / f"{name}.json", value)
    run.mark("eval", [run.eval / f"{name}.json" for name in stored], suite=recipe.eval.suite, limit=exam.limit)
    return stored


def _tuned(live: PreTrainedModel, run: Run) -> Any:
    """Return the tuned model, with the adapter in the precision in which training multiplied it."""
    dtype = live.dtype
    tuned = load_delta(live, run.delta)
    run.recipe().method.adapter.match_precision(tuned, dtype)
    return tuned


def _exam(recipe: Recipe, suite: Suite, tasks: list[Task], model: PreTrainedModel, base: Base) -> _Exam:
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    held_out: dict[str, Questions] = {}
    if HELD_OUT in suite.tasks:
        data = gate(recipe, tokenizer, stop)
        check_rows(suite, len(data.test))
        limit, context = recipe.eval.limit, context_length(model)
        held_out[HELD_OUT] = questions(data.test, [], limit, tokenizer, stop, context)
        shots = worked_examples(recipe, data, tokenizer)
        if shots:
            held_out[FEW_SHOT] = questions(data.test, shots, limit, tokenizer, stop, context)
    new_tokens = min(answer_limit(held_out[HELD_OUT]), context_length(model) // 2) if held_out else 0
    return _Exam(suite, tokenizer, stop, held_out, tasks, recipe.eval.limit or suite.limit, new_tokens)


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens the model was made for, 2048 where its configuration does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _ask(exam: _Exam, model: PreTrainedModel, is_tuned: bool = False) -> Answers:
    """Return a model's results by task, and its answers to the held-out rows; only the base is asked few-shot."""
    name = "tuned" if is_tuned else "base"
    results: dict[str, Result] = {}
    rows: dict[str, list[Answer]] = {}
    for key in [HELD_OUT] if is_tuned and exam.held_out else exam.held_out:
        began = time.monotonic()
        results[key], rows[key] = _ask_held_out(exam, model, key, exam.held_out[key])
        _report_progress(name, key, results[key], began)
    for task in exam.tasks:
        began = time.monotonic()
        scored = score_tasks(model, exam.tokenizer, [task], exam.suite.shots, exam.limit, exam.suite.chat_template)
        results |= scored
        _report_progress(name, task.task_name, scored[task.task_name], began)
    answers: Answers = {"results": results, "rows": rows.get(HELD_OUT, [])}
    if FEW_SHOT in rows:
        answers["few_shot_rows"] = rows[FEW_SHOT]
    return answers


def _ask_held_out(exam: _Exam, model: PreTrainedModel, key: str, rows: Questions) -> tuple[Result, list[Answer]]:
    """Score a model on held-out rows and return its answers; rows longer than its context have no loss."""
    with quiet():
        task = HeldOut(key, rows, exam.stop, exam.new_tokens)
    result = score_tasks(model, exam.tokenizer, [task])[key]
    outputs = result.pop("outputs")
    losses = answer_losses(model, rows.examples, int(exam.tokenizer.pad_token_id))
    tokens = [example.supervised for example in rows.examples]
    result |= {"shots": len(rows.shots), "of": rows.of, "limit": exam.limit if len(rows.rows) < rows.of else None}
    result["metrics"]["loss"] = score(losses, tokens)
    by_row = {example.where: loss / count for example, loss, count in zip(rows.examples, losses, tokens, strict=True)}
    answers: list[Answer] = [
        {
            "id": row.id,
            "question": row.prompt[-1]["content"],
            "prompt": prompt,
            "answer": row.answer,
            "output": output,
            **{metric: bool(scores[index]) for metric, scores in result["scores"].items()},  # type: ignore[typeddict-item]
            "loss": by_row.get(row.where),
        }
        for index, (row, prompt, output) in enumerate(zip(rows.rows, rows.prompts, outputs, strict=True))
    ]
    result["scores"]["loss"], result["tokens"] = losses, tokens
    return result, answers


def _report_progress(model: str, task: str, result: Result, began: float) -> None:
    title = task_title(task, result)
    print(f"{model}, {title}: {result['n']} rows in {time.monotonic() - began:.0f} s", flush=True)
    if result["truncated"]:
        print(
            f"warning: {model}, {title}: {result['truncated']} requests were longer than the model's context "
            "and lost their start"
        )


def _settings(recipe: Recipe, exam: _Exam, model: PreTrainedModel) -> dict[str, Any]:
    """Return everything that decides scores beside the weights; results under other settings are not compared."""
    tokenizer = exam.tokenizer
    tasks = {
        "names": {task.task_name: {"version": task.VERSION} for task in exam.tasks},
        "shots": exam.suite.shots,
        "system_prompt": "none",
        "chat_template": exam.suite.chat_template,
    }
    return {
        "suite": {"name": recipe.eval.suite, "sha256": fingerprint(exam.suite.path)["sha256"]},
        "limit": exam.limit,
        "held_out": _held_out_settings(recipe, exam) if exam.held_out else None,
        "tasks": tasks if exam.tasks else None,
        "chat_template_sha256": template_sha256(tokenizer),
        "bos": {"token": tokenizer.bos_token, "by": "chat template" if tokenizer.chat_template else "tokenizer"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _held_out_settings(recipe: Recipe, exam: _Exam) -> dict[str, Any]:
    few_shot = exam.held_out.get(FEW_SHOT)
    return {
        "source": recipe.data.test or recipe.data.eval or recipe.data.train,
        "rows": digest_of([row.messages for row in exam.held_out[HELD_OUT].rows]),
        "shots": len(few_shot.shots) if few_shot else 0,
        "shots_seed": FEW_SHOT_SEED,
        "shots_ids": few_shot.shots if few_shot else [],
        "shots_as": "earlier turns",
        "system_prompt": "each row's own, once",
        "chat_template": bool(exam.tokenizer.chat_template),
        "decoding": {"greedy": True, "new_tokens": exam.new_tokens, "stop_ids": sorted(exam.stop)},
    }
