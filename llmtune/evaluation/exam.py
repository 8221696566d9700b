"""The questions that both models are asked, and everything beside the weights that decides their scores."""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.template import template_sha256
from llmtune.data.findings import check_same_data
from llmtune.data.gate import FEW_SHOT_SEED, Gate, gate
from llmtune.data.row import Row
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.forgetting.general import General, load_general
from llmtune.evaluation.held_out.choice import choose
from llmtune.evaluation.held_out.texts import Texts
from llmtune.evaluation.questions import (
    Questions,
    Survey,
    answer_room,
    asking_context,
    asking_rules,
    few_shot_questions,
    fitting_shots,
    long_rows_notes,
    questions,
)
from llmtune.evaluation.results import FEW_SHOT
from llmtune.files import digest_of, fingerprint
from llmtune.inference.placement import Placement
from llmtune.machine.processes import world
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
    """The held-out rows that are questions, zero-shot and few-shot, by the task's name."""
    texts: Texts | None
    """The held-out rows that are plain texts."""
    tasks: list[Task]
    limit: int | None
    new_tokens: int
    """Tokens that an answer to a held-out row may have."""
    rules: Rules
    """By which held-out rows are encoded, with the values for the chat template."""
    metrics: tuple[str, ...] = ()
    """How answers to held-out rows are scored, by names of eval.metrics."""
    labels: tuple[str, ...] = ()
    """The answers of which the likeliest is chosen, where labels are scored."""
    groups: list[Group] = field(default_factory=list)
    """Groups of the tasks, each with a score of its own."""
    general: General | None = None
    """The general questions and texts that show what the training cost."""
    notes: list[str] = field(default_factory=list)
    """What is not asked of the held-out rows, and why."""


def make_exam(
    run: Run, suite: Suite, tasks: list[Task], groups: list[Group], model: PreTrainedModel, base: Base
) -> Exam:
    """Prepare the questions of a suite; raises FieldError where it asks for held-out rows and there are none.

    Raises RecipeError where they are other rows than when the run was made.
    """
    recipe, tokenizer, stop = run.recipe(), load_tokenizer(base), stop_ids(base)
    context = asking_context(recipe, model.config)
    rules = asking_rules(recipe.data, context)
    held_out: dict[str, Questions] = {}
    texts: Texts | None = None
    survey = Survey()
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    notes: list[str] = []
    if HELD_OUT in suite.tasks:
        data = gate(recipe, tokenizer, stop, model_limits(model))
        check_same_data(run, data.findings)
        check_rows(suite, len(data.test))
        chats, others = _split(data.test, recipe.eval.limit)
        if chats.of:
            held_out, notes = _held_out_questions(data, chats, tokenizer, stop, rules)
            survey.add(held_out[HELD_OUT])
        if chats.of or others.of:
            metrics, labels = choose(recipe.eval.metrics, survey.answers, data.rows.get("train", ()))
        if others.of:
            texts = Texts(others.rows, others.of, min(context, recipe.data.max_length))
    new_tokens = answer_room(survey, context) if held_out else 0
    limit = recipe.eval.limit or suite.limit
    general = load_general(tokenizer, context) if recipe.eval.forgetting else None
    parts = (suite, tokenizer, stop, held_out, texts, tasks, limit, new_tokens)
    return Exam(*parts, rules, metrics, labels, groups, general, notes)


@dataclass
class _Rows:
    """Held-out rows of one kind: the first of them, and how many there are."""

    rows: list[Row] = field(default_factory=list)
    of: int = 0


def _split(rows: Iterable[Row], limit: int | None) -> tuple[_Rows, _Rows]:
    """Return the first `limit` rows that are conversations, and as many that are plain texts."""
    chats, texts = _Rows(), _Rows()
    for row in rows:
        kind = chats if row.messages else texts
        kind.of += 1
        if limit is None or len(kind.rows) < limit:
            kind.rows.append(row)
    return chats, texts


def _held_out_questions(
    data: Gate, chats: _Rows, tokenizer: PreTrainedTokenizerBase, stop: set[int], rules: Rules
) -> tuple[dict[str, Questions], list[str]]:
    """Return the held-out rows, zero-shot and after as many worked examples as fit; says what does not."""
    context = rules.max_length
    zero_shot = replace(questions(chats.rows, [], None, tokenizer, stop, rules), of=chats.of)
    if not zero_shot.rows:
        raise FieldError("data", f"every held-out row is longer than the model's context of {context} tokens")
    survey = Survey().add(zero_shot)
    shots, notes = fitting_shots(data.shots, survey, tokenizer, rules)
    held_out = {HELD_OUT: zero_shot}
    if shots:
        try:
            held_out[FEW_SHOT] = few_shot_questions(zero_shot, shots, tokenizer, stop, rules)
        except RecipeError as error:
            notes = [f"few-shot is left out: {error}"]
    notes = long_rows_notes(survey, context) + notes
    for note in notes:
        print(note, flush=True)
    return held_out, notes


def settings_of(recipe: Recipe, exam: Exam, placement: Placement) -> dict[str, Any]:
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
        "texts": _text_settings(recipe, exam.texts) if exam.texts else None,
        "tasks": tasks if exam.tasks else None,
        "general": exam.general.sha256 if exam.general else None,
        "chat_template_sha256": template_sha256(tokenizer),
        "template": dict(recipe.data.template),
        "bos": {"token": tokenizer.bos_token, "by": "chat template" if tokenizer.chat_template else "tokenizer"},
        "dtype": str(placement.dtype).removeprefix("torch."),
        "quantize": f"{placement.bits}bit" if placement.bits else "none",
        "device": placement.device.type,
        "processes": world(),  # with other batches, 16 bits round otherwise and a greedy answer may turn
        "backend": recipe.eval.backend,
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *_backend(recipe))},
    }


def _backend(recipe: Recipe) -> tuple[str, ...]:
    """Return the package that runs the models beside those that always do."""
    return () if recipe.eval.backend == "transformers" else (recipe.eval.backend,)


def _held_out_settings(recipe: Recipe, exam: Exam) -> dict[str, Any]:
    few_shot, rows = exam.held_out.get(FEW_SHOT), exam.held_out[HELD_OUT].rows
    return {
        "source": _source(recipe),
        "rows": digest_of([[row.messages, row.tools] if row.tools else row.messages for row in rows]),
        "not_asked": exam.held_out[HELD_OUT].not_asked,
        "shots_wanted": recipe.eval.shots,
        "shots": len(few_shot.shots) if few_shot else 0,
        "shots_seed": FEW_SHOT_SEED,
        "shots_ids": few_shot.shots if few_shot else [],
        "shots_as": "earlier turns",
        "system_prompt": "each row's own, once",
        "chat_template": bool(exam.tokenizer.chat_template),
        "reasoning": recipe.data.reasoning,
        "metrics": list(exam.metrics),
        "labels": list(exam.labels),
        "decoding": {"greedy": True, "new_tokens": exam.new_tokens, "stop_ids": sorted(exam.stop)},
    }


def _text_settings(recipe: Recipe, texts: Texts) -> dict[str, Any]:
    rows = digest_of([row.text for row in texts.rows])
    return {"source": _source(recipe), "rows": rows, "window": texts.window}


def _source(recipe: Recipe) -> str | list[dict[str, Any]]:
    """The source of the held-out rows; the sources with their fractions where they are set aside from a mixture."""
    sources = recipe.data.held_out
    return sources[0].source if len(sources) == 1 else [source.model_dump() for source in sources]
