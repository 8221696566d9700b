"""lm-eval behind one function, `score_tasks`: a model's scores on tasks."""

import contextlib
import io
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.evaluation.generate import greedy, left_padded, rows_per_batch, shares_start
from llmtune.evaluation.held_out import HeldOut
from llmtune.evaluation.metrics import Score
from llmtune.evaluation.results import Result

TASK_BATCH = 8
SEED = 1234


class _BuiltModel(HFLM):
    """A loaded model for lm-eval: its embeddings are not resized, and requests that are truncated are counted."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, adds_bos: bool | None
    ) -> None:
        self.truncated = 0
        self.prompt_ids: dict[str, list[int]] = {}
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=rows, add_bos_token=adds_bos
        )

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask (B, T), cut to the last `left_truncate_len` tokens; held-out prompts keep their ids."""
        if self.prompt_ids:
            ids, mask = left_padded([self.prompt_ids[text] for text in strings], self.device)
        else:
            ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.truncated += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        self.truncated += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return scores

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        *,
        attention_mask: torch.Tensor,
        stop_ids: list[int] | None = None,
        **options: object,
    ) -> torch.Tensor:
        """Return prompts and answers (B, T); held-out rows end at the model's stop tokens, tasks at their own."""
        if stop_ids is None or not shares_start(self.model):
            ends = {} if stop_ids is None else {"eos_token_id": stop_ids}
            generated: torch.Tensor = super()._model_generate(
                context, max_length, stop, attention_mask=attention_mask, **ends, **options
            )
            after = generated[:, context.shape[1] :]
            after[torch.isin(after, torch.tensor(stop_ids or [], device=after.device))] = self.tokenizer.pad_token_id
            return generated
        rows = zip(context.tolist(), attention_mask.tolist(), strict=True)
        prompts = [[token for token, is_token in zip(row, mask, strict=True) if is_token] for row, mask in rows]
        answers = greedy(self.model, prompts, set(stop_ids), max_length - context.shape[1])
        texts = [[token for token in answer if token not in stop_ids] for answer in answers]
        width = max(map(len, texts))
        padded = [text + [self.tokenizer.pad_token_id] * (width - len(text)) for text in texts]
        return torch.cat([context, torch.tensor(padded, dtype=torch.long, device=context.device)], dim=1)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    shots: int = 0,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Result]:
    """Score a model on tasks and return the results by task; its modes and all random states stay as they were."""
    with _undisturbed(model), quiet():
        return {task.task_name: _score_task(model, tokenizer, task, shots, limit, chat_template) for task in tasks}


def _score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: int,
    limit: int | None,
    chat_template: bool,
) -> Result:
    held_out = isinstance(task, HeldOut)
    # A chat template writes the BOS token itself.
    built = _BuiltModel(model, tokenizer, TASK_BATCH, False if held_out or chat_template else None)
    if held_out:
        questions = task.questions
        built.prompt_ids = dict(zip(questions.prompts, questions.prompt_ids, strict=True))
        tokens = max(map(len, questions.prompt_ids)) + task.generation["max_gen_toks"]
        built.batch_size_per_gpu = rows_per_batch(model, len(questions.rows), tokens)
    elif task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    answers = evaluate(
        built,
        {"tasks": {task.task_name: task}},
        limit=limit,
        apply_chat_template=held_out or chat_template,
        fewshot_as_multiturn=chat_template,
    )
    return _result(task, answers, limit, built.truncated)


def _result(task: Task, answers: dict[str, Any], limit: int | None, truncated: int) -> Result:
    """Take over lm-eval's answers for one task; a metric of a named filter is called metric:filter."""
    name = task.task_name
    rows, samples = answers["n-samples"][name], answers["samples"][name]
    metrics: dict[str, Score] = {}
    scores: dict[str, list[float]] = {}
    for key, value in answers["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = answers["results"][name].get(f"{metric}_stderr,{kind}")
        stderr = error if isinstance(error, float) else None
        title = metric if kind == "none" else f"{metric}:{kind}"
        metrics[title] = {"value": float(value), "stderr": stderr, "n": rows["effective"]}
        values = [sample[metric] for sample in samples if sample["filter"] == kind]
        if all(isinstance(score, int | float) for score in values):
            scores[title] = [float(score) for score in values]
    result: Result = {
        "shots": answers["n-shot"][name],
        "n": rows["effective"],
        "of": rows["original"],
        "limit": limit,
        "version": task.VERSION,
        "truncated": truncated,
        "metrics": metrics,
        "scores": scores,
    }
    return {**result, "outputs": [row["filtered_resps"][0] for row in samples]} if isinstance(task, HeldOut) else result


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the block; afterwards restore every module's mode and every random state."""
    modes = [(module, module.training) for module in model.modules()]
    plain, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(arrays)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's log and progress bars; llmtune counts and reports what matters in them."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
