"""lm-eval behind one function: a model's scores on tasks."""

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

from llmtune.evaluate.generate import greedy, left_padded, rows_per_batch, shares_start
from llmtune.evaluate.held_out import HeldOut

TASK_BATCH = 8
SEED = 1234


class _Reader(HFLM):
    """lm-eval's model over one that is already built: nothing is resized, requests that had to be cut are counted."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, adds_bos: bool | None
    ) -> None:
        self.cut = 0
        self.known: dict[str, list[int]] = {}
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
        """Ids and mask (B, T), cut to the last `left_truncate_len` tokens; held-out prompts are not tokenised again."""
        if self.known:
            ids, mask = left_padded([self.known[text] for text in strings], self.device)
        else:
            ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.cut += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _loglikelihood_tokens(self, requests: list[Any], **more: Any) -> list[tuple[float, bool]]:
        self.cut += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **more)
        return found

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **more: Any) -> torch.Tensor:
        """Prompts and what follows them (B, T); held-out rows end at the model's stop tokens, tasks at their own."""
        ends = more.pop("stop_ids", None)
        if ends is None or not shares_start(self.model):
            more |= {} if ends is None else {"eos_token_id": ends}
            generated: torch.Tensor = super()._model_generate(context, max_length, stop, **more)
            after = generated[:, context.shape[1] :]
            after[torch.isin(after, torch.tensor(ends or [], device=after.device))] = self.tokenizer.pad_token_id
            return generated
        rows = zip(context.tolist(), more["attention_mask"].tolist(), strict=True)
        prompts = [[token for token, kept in zip(row, mask, strict=True) if kept] for row, mask in rows]
        answers = greedy(self.model, prompts, set(ends), max_length - context.shape[1])
        texts = [[token for token in answer if token not in ends] for answer in answers]
        width = max(map(len, texts))
        padded = [text + [self.tokenizer.pad_token_id] * (width - len(text)) for text in texts]
        return torch.cat([context, torch.tensor(padded, dtype=torch.long, device=context.device)], dim=1)


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    shots: int = 0,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, dict[str, Any]]:
    """A model's scores by task: n, of, shots, limit, version, cut requests, metrics, and per-row scores and outputs."""
    with _undisturbed(model), quiet():
        return {task.task_name: _one(model, tokenizer, task, shots, limit, chat_template) for task in tasks}


def _one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shots: int,
    limit: int | None,
    chat_template: bool,
) -> dict[str, Any]:
    held_out = isinstance(task, HeldOut)
    # A chat template writes the BOS token itself.
    reader = _Reader(model, tokenizer, TASK_BATCH, False if held_out or chat_template else None)
    if held_out:
        reader.known = dict(zip(task.asked.prompts, task.asked.starts, strict=True))
        tokens = max(map(len, task.asked.starts)) + task.generation["max_gen_toks"]
        reader.batch_size_per_gpu = rows_per_batch(model, len(task.asked.rows), tokens)
    elif task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    name = task.task_name
    found = evaluate(
        reader,
        {"tasks": {name: task}},
        limit=limit,
        apply_chat_template=held_out or chat_template,
        fewshot_as_multiturn=chat_template,
    )
    return _result(task, found, limit) | {"truncated": reader.cut}


def _result(task: Task, found: Any, limit: int | None) -> dict[str, Any]:
    """What is kept of lm-eval's answer for one task; a metric of a named filter is called metric:filter."""
    name = task.task_name
    rows, count = found["n-samples"][name]["effective"], found["n-samples"][name]["original"]
    metrics, scores = {}, {}
    for key, value in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{kind}")
        title = metric if kind == "none" else f"{metric}:{kind}"
        metrics[title] = {"value": float(value), "stderr": error if isinstance(error, float) else None, "n": rows}
        values = [sample[metric] for sample in found["samples"][name] if sample["filter"] == kind]
        if all(isinstance(one, int | float) for one in values):
            scores[title] = [float(one) for one in values]
    kept = {"shots": found["n-shot"][name], "n": rows, "of": count, "limit": limit, "version": task.VERSION}
    outputs = [sample["filtered_resps"][0] for sample in found["samples"][name]]
    return kept | {"metrics": metrics, "scores": scores} | ({"outputs": outputs} if isinstance(task, HeldOut) else {})


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's mode and every random state is as it was."""
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
    """No log lines or progress bars from lm-eval; what matters in them is counted and reported."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
