"""evaluate(run): base and tuned model on the same questions under the same settings, with everything to repeat it."""

import hashlib
import importlib.metadata
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapters.delta import load_delta
from llmtune.data.gate import gate
from llmtune.errors import ProofError
from llmtune.evaluate.generate import answer_losses
from llmtune.evaluate.harness import harness, quiet
from llmtune.evaluate.held_out import FEW_SHOT_SEED, HeldOut, Questions, questions, room, worked_examples
from llmtune.evaluate.metrics import score
from llmtune.evaluate.results import FEW_SHOT, Result, compare, paired, table
from llmtune.evaluate.tasks import load_tasks
from llmtune.files import fingerprint, write_json
from llmtune.model.base import Base, computes_bf16, load_model, load_tokenizer, locate_base, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT, Suite, check_rows, load_suite
from llmtune.run import Run, locates_mistakes

__all__ = ["compare", "evaluate", "table"]

PACKAGES = ("llmtune", "lm_eval", "torch", "transformers", "tokenizers", "peft", "datasets")


@dataclass(frozen=True)
class _Exam:
    """What every model is asked, and how."""

    suite: Suite
    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    sets: dict[str, Questions]
    tasks: list[Task]
    limit: int | None
    new_tokens: int


@locates_mistakes
def evaluate(run: Run) -> dict[str, Any]:
    """Ask base and tuned model what the recipe's suite says; writes eval/ and gives {"base", "tuned", "settings"}.

    Raises RecipeError for a bad suite, MachineError where a task's rows cannot be had, ProofError for a changed delta.
    """
    recipe = run.recipe()
    asked = load_suite(recipe)
    delta = recorded_delta(run)
    tasks = load_tasks(asked)
    base = locate_base(recipe.model)
    live = load_model(base, torch.bfloat16 if computes_bf16(recipe.model.precision) else torch.float32)
    if torch.cuda.is_available():
        live.to("cuda")
    exam = _exam(recipe, asked, tasks, live, base)
    settings = _settings(recipe, exam, live)
    weights = {file.name: fingerprint(file)["sha256"] for file in sorted(base.folder.glob("*.safetensors"))}
    named = {"name": base.name, "revision": base.revision, "hub_id": base.hub_id, "weights": weights}
    before = {"model": "base", "base": named, "delta": None, "settings": settings} | _ask(exam, live, "base", exam.sets)
    sets = {name: asked for name, asked in exam.sets.items() if name != FEW_SHOT}
    tuned = _tuned(live, run)
    after = {"model": "tuned", "base": named, "delta": delta, "settings": settings} | _ask(exam, tuned, "tuned", sets)
    after["differences"] = {"base, zero-shot": compare(after, before)}
    if FEW_SHOT in before["results"]:
        found = paired(after["results"][HELD_OUT], before["results"][FEW_SHOT])
        after["differences"]["base, few-shot"] = {HELD_OUT: found}
    configs = {task.task_name: json.loads(json.dumps(task.dump_config(), default=str)) for task in tasks}
    stored = {
        "base": before,
        "tuned": after,
        "settings": settings | {"base": named, "delta": delta, "configs": configs},
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


def recorded_delta(run: Run) -> dict[str, str]:
    """SHA-256 of each file of the delta; raises ProofError where they are not those that training wrote down."""
    found = {file.name: fingerprint(file)["sha256"] for file in sorted(run.delta.glob("*")) if file.is_file()}
    if not found:
        raise ProofError(f"{run.delta}: holds no delta; train first: llmtune train {run.path}")
    step = run.manifest()["steps"].get("train")
    if step is not None:
        written = {name.removeprefix("delta/"): facts["sha256"] for name, facts in step["files"].items()}
        odd = sorted(name for name in {*found, *written} if found.get(name) != written.get(name))
        if odd:
            raise ProofError(f"{run.delta / odd[0]}: is not what training wrote; train again: llmtune train {run.path}")
    return found


def _exam(recipe: Recipe, asked: Suite, tasks: list[Task], live: PreTrainedModel, base: Base) -> _Exam:
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    sets: dict[str, Questions] = {}
    if HELD_OUT in asked.tasks:
        data = gate(recipe, tokenizer, stop)
        check_rows(recipe, asked, len(data.test))
        limit, context = recipe.eval.limit, model_context(live)
        sets[HELD_OUT] = questions(data.test, [], limit, tokenizer, stop, context)
        shots = worked_examples(recipe, data, tokenizer)
        if shots:
            sets[FEW_SHOT] = questions(data.test, shots, limit, tokenizer, stop, context)
    new_tokens = min(room(sets[HELD_OUT]), model_context(live) // 2) if sets else 0
    return _Exam(asked, tokenizer, stop, sets, tasks, recipe.eval.limit or asked.limit, new_tokens)


def model_context(live: PreTrainedModel) -> int:
    """Tokens that the model was made for."""
    return int(getattr(live.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _ask(exam: _Exam, live: PreTrainedModel, name: str, sets: dict[str, Questions]) -> dict[str, Any]:
    """The results of one model by task, and what it answered to each held-out row."""
    results: dict[str, Result] = {}
    rows = {}
    for key, asked in sets.items():
        began = time.monotonic()
        results[key], rows[key] = _ask_rows(exam, live, key, asked)
        _say(name, key, results[key], began)
    for task in exam.tasks:
        began = time.monotonic()
        found = harness(live, exam.tokenizer, [task], exam.suite.shots, exam.limit, exam.suite.chat_template)
        results |= found
        _say(name, task.task_name, found[task.task_name], began)
    found_rows = {"rows": rows.get(HELD_OUT, [])} | ({"few_shot_rows": rows[FEW_SHOT]} if FEW_SHOT in rows else {})
    return {"results": results} | found_rows


def _ask_rows(exam: _Exam, live: PreTrainedModel, key: str, asked: Questions) -> tuple[Result, list[dict[str, Any]]]:
    """A model's result on held-out rows, and a record a row; the loss lacks rows that are longer than its context."""
    with quiet():
        task = HeldOut(key, asked, exam.stop, exam.new_tokens)
    found = harness(live, exam.tokenizer, [task])[key]
    outputs = found.pop("outputs")
    losses = answer_losses(live, asked.examples, int(exam.tokenizer.pad_token_id))
    tokens = [example.supervised for example in asked.examples]
    found |= {"shots": len(asked.shots), "of": asked.of, "limit": exam.limit if len(asked.rows) < asked.of else None}
    found["metrics"]["loss"] = score(losses, tokens)
    found["scores"]["loss"] = losses
    found["tokens"] = tokens
    of_row = {example.where: loss / count for example, loss, count in zip(asked.examples, losses, tokens, strict=True)}
    records = [
        {
            "id": row.id,
            "question": row.prompt[-1]["content"],
            "prompt": prompt,
            "answer": row.answer,
            "output": output,
            **{metric: bool(scores[place]) for metric, scores in found["scores"].items() if metric != "loss"},
            "loss": of_row.get(row.where),
        }
        for place, (row, prompt, output) in enumerate(zip(asked.rows, asked.prompts, outputs, strict=True))
    ]
    return found, records


def _say(name: str, key: str, found: Result, began: float) -> None:
    title = {HELD_OUT: "zero-shot", FEW_SHOT: f"{found['shots']}-shot"}.get(key, key)
    print(f"{name}, {title}: {found['n']} rows in {time.monotonic() - began:.0f} s", flush=True)
    if found["truncated"]:
        print(
            f"warning: {name}, {title}: {found['truncated']} requests were longer than the context and cut on the left"
        )


def _settings(recipe: Recipe, exam: _Exam, live: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides scores beside the weights; results with other settings are not compared."""
    tokenizer = exam.tokenizer
    asked = {
        "names": {task.task_name: {"version": task.VERSION} for task in exam.tasks},
        "shots": exam.suite.shots,
        "system_prompt": "none",
        "chat_template": exam.suite.chat_template,
    }
    return {
        "suite": {"name": recipe.eval.suite, "sha256": fingerprint(exam.suite.path)["sha256"]},
        "limit": exam.limit,
        "held_out": _held_out_settings(recipe, exam) if exam.sets else None,
        "tasks": asked if exam.tasks else None,
        "chat_template_sha256": _digest(tokenizer.chat_template),
        "bos": {"token": tokenizer.bos_token, "by": "chat template" if tokenizer.chat_template else "tokenizer"},
        "dtype": str(live.dtype).removeprefix("torch."),
        "device": live.device.type,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _held_out_settings(recipe: Recipe, exam: _Exam) -> dict[str, Any]:
    few = exam.sets.get(FEW_SHOT)
    return {
        "source": recipe.data.test or recipe.data.eval or recipe.data.train,
        "rows": _digest([row.messages for row in exam.sets[HELD_OUT].rows]),
        "shots": len(few.shots) if few else 0,
        "shots_seed": FEW_SHOT_SEED,
        "shots_ids": few.shots if few else [],
        "shots_as": "earlier turns",
        "system_prompt": "each row's own, once",
        "chat_template": bool(exam.tokenizer.chat_template),
        "decoding": {"greedy": True, "new_tokens": exam.new_tokens, "stop_ids": sorted(exam.stop)},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
