"""lm-eval behind one function, `score_tasks`: a model's scores on tasks."""

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bypass_agg, mean
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.errors import ProofError
from llmtune.evaluation.aggregates import add_metric
from llmtune.evaluation.boundary import failures_named
from llmtune.evaluation.generate import rows_per_batch
from llmtune.evaluation.held_out.task import HeldOut
from llmtune.evaluation.loaded_model import LoadedModel
from llmtune.evaluation.metrics import finite
from llmtune.evaluation.results import Result
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.evaluation.vllm.served import ServedModel
from llmtune.loggers import quiet_loggers
from llmtune.machine.device import forked_rng
from llmtune.working import working

TASK_BATCH, REHEARSED = 8, 2
SEED = 1234


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    shots: int | None = None,
    limit: int | None = None,
    template: Mapping[str, Any] | None = None,
    name: str = "model",
) -> dict[str, Result]:
    """Score a model on tasks and return the results by task; its modes and all random states stay as they were.

    Without `shots`, each task has its own number of worked examples. `template` holds values for the chat template
    through which questions of lm-eval's tasks go; None for no template.
    Raises ProofError, naming model and task, for one that lm-eval cannot score; MachineError where memory is full.
    """
    results: dict[str, Result] = {}
    for task in tasks:
        title = f"{name}, {_title(task)}"
        with failures_named(title, "leave this task out of the suite"), _undisturbed(model), quiet(), working(title):
            built = _load(model, tokenizer, task, template, title)
            results[task.task_name] = _score_task(built, task, shots, limit, template is not None)
    return results


class StandIn(LM):
    """Gives every request the same answer, where a task is to be scored without a model."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the same log-likelihood for each continuation."""
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the same log-likelihood for each text."""
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the same text for each prompt."""
        return ["answer"] * len(requests)


def rehearse(task: Task, shots: int | None) -> bool:
    """Score two rows of a task with answers of no model, and tell whether that gives a score.

    A task that cannot be scored, whatever a model answers, raises lm-eval's error here.
    """
    with _undisturbed(torch.nn.Module()), quiet():
        _set_shots(task, shots)
        answers = evaluate(StandIn(), {"tasks": {task.task_name: task}}, limit=REHEARSED, bootstrap_iters=0)
    return any("," in key for key in answers["results"][task.task_name])


def _set_shots(task: Task, shots: int | None) -> None:
    """Set the number of worked examples as lm-eval does: a task that sets 0 keeps it, one that sets none has none."""
    own = task.get_config("num_fewshot")
    if own is None or (own and shots is not None):
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(SEED)


def _title(task: Task) -> str:
    """Name a task for people: held-out rows by their number of worked examples."""
    if isinstance(task, HeldOut):
        return f"{len(task.questions.shots)}-shot" if task.questions.shots else "zero-shot"
    return str(task.task_name)


def _load(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    template: Mapping[str, Any] | None,
    title: str,
) -> LoadedModel:
    """Return the model as lm-eval asks it; for held-out rows, with their token ids and batches that fit them."""
    kind: Any = ServedModel if isinstance(model, VllmModel) else LoadedModel
    if not isinstance(task, HeldOut):
        # A chat template writes the BOS token itself.
        return kind(model, tokenizer, TASK_BATCH, None if template is None else False, title, template)
    built = kind(model, tokenizer, TASK_BATCH, False, title)
    questions = task.questions
    built.prompt_ids = dict(zip(questions.prompts, questions.prompt_ids, strict=True))
    built.special = questions.special
    if kind is ServedModel:
        return built
    new_tokens: Any = task.generation["max_gen_toks"]
    longest = max(map(len, questions.prompt_ids))
    built.batch_size_per_gpu = rows_per_batch(model, len(questions.rows), longest + new_tokens)
    return built


def _score_task(built: LoadedModel, task: Task, shots: int | None, limit: int | None, chat_template: bool) -> Result:
    held_out = isinstance(task, HeldOut)
    if not held_out:
        _set_shots(task, shots)
    answers = evaluate(
        built,
        {"tasks": {task.task_name: task}},
        limit=limit,
        # Standard errors are computed below: lm-eval draws rows 100,000 times, in processes of its own.
        bootstrap_iters=0,
        apply_chat_template=held_out or chat_template,
        fewshot_as_multiturn=chat_template,
    )
    built.join_counts()
    if built.requests and built.not_finite == built.requests:
        raise ProofError(f"{built.name}: no log-likelihood is a finite number, so nothing can be scored")
    return _result(task, answers, limit, built)


def _result(task: Task, answers: dict[str, Any], limit: int | None, built: LoadedModel) -> Result:
    """Take over lm-eval's answers for one task; a metric of a named filter is called metric:filter."""
    name = task.task_name
    rows, samples = answers["n-samples"][name], answers["samples"][name]
    result: Result = {
        "shots": answers["n-shot"][name],
        "n": rows["effective"],
        "of": rows["original"],
        "limit": limit,
        "version": task.VERSION,
        "truncated": built.truncated,
        "not_finite": built.not_finite,
        "metrics": {},
        "scores": {},
        "higher_is_better": {},
        "resamples": {},
    }
    for key, value in answers["results"][name].items():
        metric, _, kind = key.rpartition(",")
        aggregation = task.aggregation().get(metric, mean)
        if not metric or metric.endswith("_stderr") or aggregation is bypass_agg:
            continue
        of_kind = [sample for sample in samples if sample["filter"] == kind]
        items = {row: sample[metric] for row, sample in enumerate(of_kind) if metric in sample}
        title = metric if kind == "none" else f"{metric}:{kind}"
        add_metric(result, f"{built.name}, {title}", title, finite(value), aggregation, items, len(of_kind))
        direction = answers["higher_is_better"][name].get(metric)
        if direction is not None:
            result["higher_is_better"][title] = bool(direction)
    if not result["metrics"]:
        raise ProofError(f"{built.name}: the task gives no score")
    return {**result, "outputs": [row["filtered_resps"][0] for row in samples]} if isinstance(task, HeldOut) else result


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the block; afterwards restore every module's mode and every random state."""
    modes = [(module, module.training) for module in model.modules()]
    plain, arrays = random.getstate(), numpy.random.get_state()
    try:
        with forked_rng(*{one.device for one in model.parameters()}):
            model.eval()
            yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(arrays)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs of lm-eval and of what it uses, and warnings; llmtune reports what matters in them."""
    with quiet_loggers(("lm_eval", "sacrebleu", "datasets"), logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
