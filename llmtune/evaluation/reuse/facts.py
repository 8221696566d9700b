"""All that decides what a base answers: itself, where it computes and by which code, and what it is asked."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.task import Task

import llmtune
from llmtune.data.example import Example
from llmtune.evaluation.exam import Exam
from llmtune.evaluation.forgetting.general import General
from llmtune.evaluation.held_out.texts import Texts
from llmtune.evaluation.questions import Questions
from llmtune.evaluation.results import GENERAL_PART, TEXTS
from llmtune.files import as_json, digest_of, digest_of_files
from llmtune.inference.placement import Placement, linear_layers
from llmtune.model.base import Base, build_skeleton
from llmtune.model.files.fingerprints import fingerprint_base
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT

_SETTINGS = (
    "chat_template_sha256",
    "template",
    "bos",
    "dtype",
    "quantize",
    "device",
    "processes",
    "backend",
    "versions",
)
"""The settings that decide every answer; those of its rows stand in the part itself."""
_CODE = ("data", "evaluation", "inference", "kernels", "machine", "model")
"""The packages whose code decides answers."""


def model_facts(recipe: Recipe, base: Base, placement: Placement, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides each of a base's answers beside the question, as plain values."""
    layers = linear_layers(recipe, build_skeleton(base)) if placement.bits else None
    files = {name: facts["sha256"] for name, facts in fingerprint_base(base).items()}
    return as_json(
        {
            "settings": {name: settings[name] for name in _SETTINGS},
            "base": [base.revision if base.converted else None, files, base.added],
            "linear": layers and digest_of(layers),
            "processor": _processor(placement.device),
            "code": _code_digest(),
        }
    )


def part_facts(exam: Exam, part: str) -> dict[str, Any]:
    """Return what a part of an exam asks and how it is scored, as plain values."""
    if part in exam.held_out:
        facts = _question_facts(exam, exam.held_out[part])
    elif part == GENERAL_PART and exam.general is not None:
        facts = _general_facts(exam.general)
    elif part in (TEXTS, HELD_OUT) and exam.texts is not None:
        facts = _text_facts(exam.texts)
    else:
        facts = _task_facts(exam, next(task for task in exam.tasks if task.task_name == part))
    return as_json({"part": part, "limit": exam.limit, **facts})


def _question_facts(exam: Exam, asked: Questions) -> dict[str, Any]:
    questions = [asked.prompts, [list(ids) for ids in asked.prompt_ids], _tokens(asked.examples)]
    shown = [[row.id, row.messages, row.tools] for row in asked.rows]
    return {
        "questions": digest_of(questions),
        "rows": digest_of(as_json(shown)),
        "truths": digest_of([asdict(truth) for truth in asked.truths]),
        "special": asked.special,
        "of": asked.of,
        "shots": asked.shots,
        "metrics": exam.metrics,
        "labels": exam.labels,
        "new_tokens": exam.new_tokens,
        "stop": sorted(exam.stop),
        "rules": asdict(exam.rules),
    }


def _text_facts(texts: Texts) -> dict[str, Any]:
    rows = [[row.id, row.text, row.continues, row.goes_on] for row in texts.rows]
    return {"rows": digest_of(rows), "of": texts.of, "window": texts.window}


def _general_facts(general: General) -> dict[str, Any]:
    questions = [_tokens(question) for question in general.questions]
    return {"questions": digest_of([questions, general.lengths]), "texts": digest_of(_tokens(general.texts))}


def _task_facts(exam: Exam, task: Task) -> dict[str, Any]:
    own, wanted = task.get_config("num_fewshot"), exam.suite.shots
    shots = own if wanted is None or own == 0 else wanted
    rules = asdict(exam.rules) if exam.suite.chat_template else None
    return {
        "config": task.dump_config(),
        "version": task.VERSION,
        "rows": _digest_of_rows(islice(task.eval_docs, exam.limit)),
        "shots": shots,
        "examples": _digest_of_rows(task.fewshot_docs() or ()) if shots else None,
        "rules": rules,
    }


def _tokens(examples: Sequence[Example]) -> list[list[list[int]]]:
    return [[list(example.input_ids), list(example.labels)] for example in examples]


def _digest_of_rows(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{json.dumps(row, default=str)}\n".encode())
    return digest.hexdigest()


def _processor(device: torch.device) -> str:
    """The card; of a CPU its instructions and the threads that share a product, which decide how sums are rounded."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def _code_digest() -> str:
    root = Path(llmtune.__file__).parent
    return digest_of({name: digest_of_files(root / name, "*.py") for name in _CODE})
