"""The questions that both models are asked, and everything beside the weights that decides their scores."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.template import template_sha256
from llmtune.data.findings import check_same_data
from llmtune.data.gate import FEW_SHOT_SEED, Gate, gate
from llmtune.errors import FieldError
from llmtune.evaluation.questions import (
    Questions,
    answer_room,
    context_length,
    few_shot_questions,
    fitting_shots,
    long_rows_notes,
    questions,
)
from llmtune.evaluation.results import FEW_SHOT
from llmtune.files import digest_of, fingerprint
from llmtune.inference.placement import Placement
from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer, model_limits, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT, Suite, check_rows
from llmtune.run import Run

PACKAGES = ("llmtune", "lm_eval", "torch", "transformers", "tokenizers", "peft", "datasets")


@dataclass(frozen=True)
class Exam:
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


def make_exam(run: Run, suite: Suite, tasks: list[Task], model: PreTrainedModel, base: Base) -> Exam:
    """Prepare the questions of a suite; raises FieldError where it asks for held-out rows and there are none.

    Raises RecipeError where they are other rows than when the run was made.
    """
    recipe, tokenizer, stop = run.recipe(), load_tokenizer(base), stop_ids(base)
    context = context_length(model.config)
    held_out: dict[str, Questions] = {}
    if HELD_OUT in suite.tasks:
        data = gate(recipe, tokenizer, stop, model_limits(model))
        check_same_data(run, data.findings)
        check_rows(suite, len(data.test))
        held_out = _held_out_questions(data, recipe.eval.limit, tokenizer, stop, context)
    new_tokens = answer_room(held_out[HELD_OUT], context) if held_out else 0
    return Exam(suite, tokenizer, stop, held_out, tasks, recipe.eval.limit or suite.limit, new_tokens)


def _held_out_questions(
    data: Gate, limit: int | None, tokenizer: PreTrainedTokenizerBase, stop: set[int], context: int
) -> dict[str, Questions]:
    """Return the held-out rows, zero-shot and after as many worked examples as fit; says what does not."""
    zero_shot = questions(data.test, [], limit, tokenizer, stop, context)
    if not zero_shot.rows:
        raise FieldError("data", f"every held-out row is longer than the model's context of {context} tokens")
    shots, notes = fitting_shots(data.shots, zero_shot, tokenizer, context)
    for note in long_rows_notes(zero_shot, context) + notes:
        print(note, flush=True)
    few_shot = {FEW_SHOT: few_shot_questions(zero_shot, shots, tokenizer, stop, context)} if shots else {}
    return {HELD_OUT: zero_shot, **few_shot}


def settings_of(recipe: Recipe, exam: Exam, model: PreTrainedModel, placement: Placement) -> dict[str, Any]:
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
        "dtype": str(placement.dtype).removeprefix("torch."),
        "quantize": f"{placement.bits}bit" if placement.bits else "none",
        "device": model.device.type,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _held_out_settings(recipe: Recipe, exam: Exam) -> dict[str, Any]:
    few_shot = exam.held_out.get(FEW_SHOT)
    return {
        "source": ", ".join(part.source for part in recipe.data.held_out),
        "rows": digest_of([row.messages for row in exam.held_out[HELD_OUT].rows]),
        "not_asked": exam.held_out[HELD_OUT].not_asked,
        "shots_wanted": recipe.eval.shots,
        "shots": len(few_shot.shots) if few_shot else 0,
        "shots_seed": FEW_SHOT_SEED,
        "shots_ids": few_shot.shots if few_shot else [],
        "shots_as": "earlier turns",
        "system_prompt": "each row's own, once",
        "chat_template": bool(exam.tokenizer.chat_template),
        "decoding": {"greedy": True, "new_tokens": exam.new_tokens, "stop_ids": sorted(exam.stop)},
    }
