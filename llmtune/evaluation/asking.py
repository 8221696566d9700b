"""Asks one model everything: the held-out rows with their losses, and each task of the suite."""

import time
from functools import partial

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
from llmtune.evaluation.results import FEW_SHOT, TEXTS, Answer, Answers, Result
from llmtune.evaluation.spread.share import of_all, spread
from llmtune.evaluation.tables import task_title
from llmtune.recipe.suite import HELD_OUT
from llmtune.working import working


def ask(exam: Exam, model: PreTrainedModel, is_tuned: bool = False) -> Answers:
    """Return a model's results by task, and its answers to the held-out rows; only the base is asked few-shot."""
    name = "tuned" if is_tuned else "base"
    results: dict[str, Result] = {}
    rows: dict[str, list[Answer]] = {}
    for key in [HELD_OUT] if is_tuned and exam.held_out else exam.held_out:
        began = time.monotonic()
        results[key], rows[key] = _ask_held_out(exam, model, key, exam.held_out[key], name)
        _report(name, key, results[key], began)
    if exam.texts is not None:
        began, key = time.monotonic(), TEXTS if exam.held_out else HELD_OUT
        results[key], texts = _read_texts(exam, model, exam.texts, f"{name}, held-out texts")
        rows[HELD_OUT] = rows.get(HELD_OUT, []) + texts
        _report(name, key, results[key], began)
    for task in exam.tasks:
        began = time.monotonic()
        suite = exam.suite
        values = exam.rules.template if suite.chat_template else None
        results |= score_tasks(model, exam.tokenizer, [task], suite.shots, exam.limit, values, name)
        _report(name, task.task_name, results[task.task_name], began)
    for group in exam.groups:
        results[group.name] = group_result(group, results)
        for task in group.get_all_tasks():
            results[task.task_name]["group"] = group.name
    if exam.general is not None:
        results |= _ask_general(exam, exam.general, model, name)
    answers: Answers = {"results": results, "rows": rows.get(HELD_OUT, [])}
    if FEW_SHOT in rows:
        answers["few_shot_rows"] = rows[FEW_SHOT]
    return answers


def _ask_held_out(
    exam: Exam, model: PreTrainedModel, key: str, rows: Questions, name: str
) -> tuple[Result, list[Answer]]:
    """Score a model on held-out rows and return its answers."""
    with quiet():
        task = HeldOut(key, rows, exam.stop, exam.new_tokens, exam.metrics)
    result = score_tasks(model, exam.tokenizer, [task], name=name)[key]
    outputs = result.pop("outputs")
    result |= {"shots": len(rows.shots), "of": rows.of, "limit": exam.limit if len(rows.rows) < rows.of else None}
    result["compared"] = task.comparison
    title = f"{name}, {task_title(key, result)}"
    labels = _label_rows(exam, model, rows, result, title) if exam.labels else None
    losses = _losses(exam, model, rows, title)
    tokens = [example.supervised for example in rows.examples]
    answers = _answers(rows, result, outputs, [loss and loss / n for loss, n in zip(losses, tokens, strict=True)])
    for answer, label in zip(answers, labels or (), strict=False):
        answer["label"] = label
    add_losses(result, losses, tokens, PERPLEXITY in exam.metrics)
    return result, answers


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


def _read_texts(exam: Exam, model: PreTrainedModel, texts: Texts, name: str) -> tuple[Result, list[Answer]]:
    """Measure a model's loss on held-out texts; raises ProofError where no text has a finite one."""
    with lacks_named(name), working(name, len(texts.rows), "texts") as step:
        result, answers = score_texts(model, texts, exam.tokenizer, exam.limit, step)
    if result["not_finite"] == result["n"]:
        raise ProofError(f"{name}: no text has a finite loss, so nothing can be scored")
    return result, answers


def _ask_general(exam: Exam, general: General, model: PreTrainedModel, name: str) -> dict[str, Result]:
    """Score a model on the general questions and texts."""
    title, began = f"{name}, general questions and texts", time.monotonic()
    requests = len(general.texts) + sum(map(len, general.questions))
    with lacks_named(title), working(title, requests, "requests") as step:
        results = ask_general(general, model, exam.tokenizer, of_all(step))
    rows = sum(result["n"] for result in results.values())
    print(f"{title}: {rows} rows in {time.monotonic() - began:.0f} s", flush=True)
    return results


def _losses(exam: Exam, model: PreTrainedModel, rows: Questions, name: str) -> list[float | None]:
    """Return each row's loss, None for one that is not finite; raises ProofError where none is."""
    with lacks_named(f"{name}, loss"), working(f"{name}: loss", len(rows.examples), "rows") as step:
        ask = partial(answer_losses, model, pad_id=int(exam.tokenizer.pad_token_id), step=of_all(step))
        losses = [finite(loss) for loss in spread(rows.examples, ask, lambda row: len(row.input_ids))]
    if losses and all(loss is None for loss in losses):
        raise ProofError(f"{name}: no row has a finite loss, so nothing can be scored")
    return losses


def _report(model: str, task: str, result: Result, began: float) -> None:
    title = f"{model}, {task_title(task, result)}"
    print(f"{title}: {result['n']} rows in {time.monotonic() - began:.0f} s", flush=True)
    if result["truncated"]:
        print(
            f"warning: {title}: {result['truncated']} requests were longer than the model's context "
            "and lost their start"
        )
    if result["not_finite"]:
        print(f"warning: {title}: {result['not_finite']} requests have a likelihood that is not a finite number")
