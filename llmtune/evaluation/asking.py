"""Asks one model everything: the held-out rows with their losses, and each task of the suite."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from lm_eval.api.task import Task
from transformers import PreTrainedModel

from llmtune.errors import ProofError
from llmtune.evaluation.boundary import lacks_named
from llmtune.evaluation.exam import Exam
from llmtune.evaluation.forgetting.general import General, ask_general
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.groups.scores import group_result
from llmtune.evaluation.harness import quiet, score_tasks
from llmtune.evaluation.held_out.choice import EXACT_MATCH, PERPLEXITY
from llmtune.evaluation.held_out.labels import LabelTexts, add_labels, likeliest
from llmtune.evaluation.held_out.losses import add_losses
from llmtune.evaluation.held_out.task import HeldOut
from llmtune.evaluation.held_out.texts import Texts, score_texts
from llmtune.evaluation.metrics import finite
from llmtune.evaluation.questions import Questions
from llmtune.evaluation.results import FEW_SHOT, GENERAL_PART, TEXTS, Answer, Answers, Result
from llmtune.evaluation.reuse.answers import BaseAnswers, Part
from llmtune.evaluation.spread.share import of_all, spread
from llmtune.evaluation.tables import task_title
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.inference.room import LargestBatch, largest_batch
from llmtune.machine.processes import gather
from llmtune.recipe.suite import HELD_OUT
from llmtune.working import working


def ask(exam: Exam, model: PreTrainedModel, base: BaseAnswers | None = None) -> Answers:
    """Return a model's results by task, and its answers to the held-out rows.

    `base` says that it is the base, which is asked few-shot too, and not again what it was asked before.
    """
    name = "base" if base else "tuned"
    results: dict[str, Result] = {}
    rows: dict[str, list[Answer]] = {}
    for part, work in _parts(exam, model, name).items():
        of_part, rows[part] = _recalled(part, base, name) or _asked(part, work, base, name)
        results |= of_part
    for group in exam.groups:
        results[group.name] = group_result(group, results)
        for task in group.get_all_tasks():
            results[task.task_name]["group"] = group.name
    answers: Answers = {"results": results, "rows": rows.get(HELD_OUT, []) + rows.get(TEXTS, [])}
    if FEW_SHOT in rows:
        answers["few_shot_rows"] = rows[FEW_SHOT]
    return answers


def _parts(exam: Exam, model: PreTrainedModel, name: str) -> dict[str, Callable[[], Part]]:
    """Return what asks each part of an exam, in order; only the base is asked few-shot."""
    parts: dict[str, Callable[[], Part]] = {}
    for key in exam.held_out if name == "base" else [HELD_OUT] if exam.held_out else []:
        parts[key] = partial(_ask_held_out, exam, model, key, exam.held_out[key], name)
    if exam.texts is not None:
        key = TEXTS if exam.held_out else HELD_OUT
        parts[key] = partial(_read_texts, exam, model, key, exam.texts, f"{name}, held-out texts")
    values = exam.rules.template if exam.suite.chat_template else None
    for task in exam.tasks:
        parts[task.task_name] = partial(_ask_task, exam, model, task, values, name)
    if exam.general is not None:
        parts[GENERAL_PART] = partial(_ask_general, exam, exam.general, model, name)
    return parts


def _recalled(part: str, base: BaseAnswers | None, name: str) -> Part | None:
    """Return what the base answered before, and say so; None where it is to be asked."""
    kept = base.recall(part) if base else None
    if kept is None:
        return None
    answers, given = kept
    _report(name, part, answers[0], f"as of {given}; same weights, questions and settings")
    return answers


def _asked(part: str, work: Callable[[], Part], base: BaseAnswers | None, name: str) -> Part:
    """Ask a part and say how long it took; what the base answers is kept."""
    began = time.monotonic()
    answers = work()
    seconds = time.monotonic() - began
    _report(name, part, answers[0], f"in {seconds:.0f} s")
    if base:
        base.keep(part, answers, seconds)
    return answers


def _ask_task(exam: Exam, model: PreTrainedModel, task: Task, values: Mapping[str, Any] | None, name: str) -> Part:
    with _batches(model) as rows:
        results = score_tasks(model, exam.tokenizer, [task], exam.suite.shots, exam.limit, values, name)
    return _with_batches(results, answers=rows), []


def _ask_held_out(exam: Exam, model: PreTrainedModel, key: str, rows: Questions, name: str) -> Part:
    """Score a model on held-out rows and return its answers."""
    with quiet():
        task = HeldOut(key, rows, exam.stop, exam.new_tokens, exam.metrics)
    with _batches(model) as of_answers:
        result = score_tasks(model, exam.tokenizer, [task], name=name)[key]
    outputs = result.pop("outputs")
    result |= {"shots": len(rows.shots), "of": rows.of, "limit": exam.limit if len(rows.rows) < rows.of else None}
    result["compared"] = task.comparison
    title = f"{name}, {task_title(key, result)}"
    labels = _label_rows(exam, model, rows, result, title) if exam.labels else None
    with _batches(model) as of_losses:
        losses = _losses(exam, model, rows, title)
    tokens = [example.supervised for example in rows.examples]
    answers = _answers(rows, result, outputs, [loss and loss / n for loss, n in zip(losses, tokens, strict=True)])
    for answer, label in zip(answers, labels or (), strict=False):
        answer["label"] = label
    add_losses(result, losses, tokens, PERPLEXITY in exam.metrics)
    return _with_batches({key: result}, answers=of_answers, losses=of_losses), answers


def _label_rows(exam: Exam, model: PreTrainedModel, rows: Questions, result: Result, name: str) -> list[str | None]:
    """Add the scores of labels and return the likeliest one of each row."""
    texts = LabelTexts(exam.labels, exam.tokenizer, exam.stop, exam.rules)
    title = f"{name}: {len(exam.labels)} labels"
    with lacks_named(title), working(title, len(rows.rows), "rows") as step:
        labels = likeliest(model, rows, texts, step)
    add_labels(result, title, labels, [truth.final.strip() for truth in rows.truths])
    return labels


def _answers(rows: Questions, result: Result, outputs: list[str], losses: list[float | None]) -> list[Answer]:
    """Return what results keep of each row; `losses` are by token."""
    yes_or_no = [name for name in (EXACT_MATCH, "valid_json") if name in result["scores"]]
    others = [name for name in result["scores"] if name not in yes_or_no]
    return [
        {
            "id": row.id,
            "question": row.messages[-2]["content"],
            "prompt": prompt,
            "answer": truth.text,
            "output": output,
            **{name: bool(result["scores"][name][index]) for name in yes_or_no},  # type: ignore[typeddict-item]
            **({"scores": {name: result["scores"][name][index] for name in others}} if others else {}),
            "loss": loss,
        }
        for index, (row, prompt, truth, output, loss) in enumerate(
            zip(rows.rows, rows.prompts, rows.truths, outputs, losses, strict=True)
        )
    ]


def _read_texts(exam: Exam, model: PreTrainedModel, key: str, texts: Texts, name: str) -> Part:
    """Measure a model's loss on held-out texts; raises ProofError where no text has a finite one."""
    with lacks_named(name), working(name, len(texts.rows), "texts") as step, _batches(model) as rows:
        result, answers = score_texts(model, texts, exam.tokenizer, exam.limit, step)
    if result["not_finite"] == result["n"]:
        raise ProofError(f"{name}: no text has a finite loss, so nothing can be scored")
    return _with_batches({key: result}, losses=rows), answers


def _ask_general(exam: Exam, general: General, model: PreTrainedModel, name: str) -> Part:
    """Score a model on the general questions and texts."""
    title = f"{name}, {GENERAL_PART}"
    requests = len(general.texts) + sum(map(len, general.questions))
    with lacks_named(title), working(title, requests, "requests") as step, _batches(model) as rows:
        results = ask_general(general, model, exam.tokenizer, of_all(step))
    return _with_batches(results, losses=rows), []


def _batches(model: PreTrainedModel) -> AbstractContextManager[LargestBatch]:
    """Find the largest batch of the block; vLLM makes its own."""
    return nullcontext(LargestBatch()) if isinstance(model, VllmModel) else largest_batch(model)


def _with_batches(results: dict[str, Result], **batches: LargestBatch) -> dict[str, Result]:
    """Add to results the largest batches of all processes, by what they were for."""
    rows = {what: max(gather(batch.rows)) for what, batch in batches.items()}
    return {task: {**result, "batch_rows": rows} if any(rows.values()) else result for task, result in results.items()}


def _losses(exam: Exam, model: PreTrainedModel, rows: Questions, name: str) -> list[float | None]:
    """Return each row's loss, None for one that is not finite; raises ProofError where none is."""
    with lacks_named(f"{name}, loss"), working(f"{name}: loss", len(rows.examples), "rows") as step:
        ask = partial(answer_losses, model, pad_id=int(exam.tokenizer.pad_token_id), step=of_all(step))
        losses = [finite(loss) for loss in spread(rows.examples, ask, lambda row: len(row.input_ids))]
    if losses and all(loss is None for loss in losses):
        raise ProofError(f"{name}: no row has a finite loss, so nothing can be scored")
    return losses


def _report(model: str, part: str, results: Mapping[str, Result], how: str) -> None:
    """Say how many rows of a part were scored and how, and what to look at."""
    rows = sum(result["n"] for result in results.values())
    names = {task: task_title(task, result) for task, result in results.items()}
    print(f"{model}, {part if part == GENERAL_PART else names[part]}: {rows} rows {how}", flush=True)
    for task, result in results.items() if part != GENERAL_PART else ():
        title = f"{model}, {names[task]}"
        if result["truncated"]:
            lost = f"{result['truncated']} requests were longer than the model's context and lost their start"
            print(f"warning: {title}: {lost}")
        if result["not_finite"]:
            print(f"warning: {title}: {result['not_finite']} requests have a likelihood that is not a finite number")
