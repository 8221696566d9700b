"""The questions that both models are asked, and everything beside the weights that decides their scores."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.gate import gate
from llmtune.data.template import template_sha256
from llmtune.evaluation.held_out import FEW_SHOT_SEED, Questions, answer_limit, questions, worked_examples
from llmtune.evaluation.results import FEW_SHOT
from llmtune.files import digest_of, fingerprint
from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer, model_limits, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT, Suite, check_rows

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


def make_exam(recipe: Recipe, suite: Suite, tasks: list[Task], model: PreTrainedModel, base: Base) -> Exam:
    """Prepare the questions of a suite; raises FieldError where it asks for held-out rows and there are none."""
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    held_out: dict[str, Questions] = {}
    if HELD_OUT in suite.tasks:
        data = gate(recipe, tokenizer, stop, model_limits(model))
        check_rows(suite, len(data.test))
        limit, context = recipe.eval.limit, context_length(model)
        held_out[HELD_OUT] = questions(data.test, [], limit, tokenizer, stop, context)
        shots = worked_examples(recipe, data, tokenizer)
        if shots:
            held_out[FEW_SHOT] = questions(data.test, shots, limit, tokenizer, stop, context)
    new_tokens = min(answer_limit(held_out[HELD_OUT]), context_length(model) // 2) if held_out else 0
    return Exam(suite, tokenizer, stop, held_out, tasks, recipe.eval.limit or suite.limit, new_tokens)


def context_length(model: PreTrainedModel) -> int:
    """Return how many tokens the model was made for, 2048 where its configuration does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def settings_of(recipe: Recipe, exam: Exam, model: PreTrainedModel) -> dict[str, Any]:
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


def _held_out_settings(recipe: Recipe, exam: Exam) -> dict[str, Any]:
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
