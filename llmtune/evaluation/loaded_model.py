"""A loaded model behind lm-eval's interface, which asks it all that a task wants to know."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.evaluation.generate import greedy, hides_left_padding, rows_per_batch, shares_start
from llmtune.evaluation.spread.share import of_all, spread, total
from llmtune.inference.ends import score_shared
from llmtune.inference.passes import left_padded
from llmtune.inference.room import in_halves, room_for_batches, row_bytes
from llmtune.working import Step, working


class _Counter(CacheHook):
    """Is told of every request that is done, as lm-eval's cache is."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__(None)
        self._count = count

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count a request; a rolling one is counted by its windows."""
        if attr != "loglikelihood_rolling":
            self._count()


def _uncounted(amount: float = 1) -> None:
    """Count nothing."""


@contextlib.contextmanager
def _left_as_tied(model: PreTrainedModel) -> Iterator[None]:
    """Keep lm-eval from tying a loaded model's weights again: embeddings with new tokens are a layer of PEFT's."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


class LoadedModel(HFLM):
    """A loaded model for lm-eval: its embeddings are not resized, and log-likelihoods are those of fp32.

    It shows how many requests are done, and counts those that are cut and those whose score is not a finite number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        adds_bos: bool | None,
        name: str,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.truncated, self.not_finite, self.requests = 0, 0, 0
        self.prompt_ids: Mapping[str, Sequence[int]] = {}
        self.special = False
        self.name, self._rows = name, rows
        self._step: Step = _uncounted
        with _left_as_tied(model):
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=rows,
                add_bos_token=adds_bos,
                softmax_dtype=torch.float32,
                chat_template_args=dict(template or {}),
            )
        self.set_cache_hook(_Counter(self._count))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation."""
        with self._shown(len(requests), "requests"):
            ask = partial(super().loglikelihood, disable_tqdm=disable_tqdm)
            # Ends of one token after the same text are scored by one pass.
            return spread(requests, ask, lambda request: sum(map(len, request.args)), lambda request: request.args[0])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text."""
        tokens = [len(self.tok_encode(request.args[0])) for request in requests]
        with self._shown(sum(-(-count // self.max_length) for count in tokens), "windows"):
            ask = partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm)
            return spread(requests, ask, lambda request: len(request.args[0]))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy answer to each prompt."""
        if not self.prompt_ids and room_for_batches(self.model).is_gpu:
            self.batch_size_per_gpu = rows_per_batch(self.model, len(requests), self._longest_answer(requests))
        with self._shown(len(requests), "rows"):
            ask = partial(super().generate_until, disable_tqdm=disable_tqdm)
            return spread(requests, ask, lambda request: len(request.args[0]))

    def join_counts(self) -> None:
        """Add up what each process counted."""
        self.truncated, self.not_finite, self.requests = map(total, (self.truncated, self.not_finite, self.requests))

    def _longest_answer(self, requests: list[Instance]) -> int:
        """Count the tokens of the longest prompt together with the longest answer, as far as the context goes."""
        prompts = max(len(self.tok_encode(request.args[0])) for request in requests)
        options = [request.args[1] for request in requests]
        answers = max(int(one.get("max_gen_toks") or one.get("max_new_tokens") or self.max_gen_toks) for one in options)
        return int(min(prompts + answers, self.max_length))

    @contextlib.contextmanager
    def _shown(self, requests: int, unit: str) -> Iterator[None]:
        with working(self.name, requests, unit) as step:
            self._step = of_all(step)
            yield
        self._step = _uncounted

    def _count(self) -> None:
        """Count one request; held-out rows are counted while their answers grow."""
        if not self.prompt_ids:
            self._step()

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

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; answers to held-out rows keep special tokens where the true ones have some."""
        if self.special and skip_special_tokens:
            tokens = [token for token in tokens if token != self.tokenizer.pad_token_id]
            skip_special_tokens = False
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request; a text that several ends go on from is read once.

        Rolling windows, which have no text, count here.
        """
        self.truncated += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        known = self._score_questions(requests)
        others = [request for place, request in enumerate(requests) if place not in known]
        self._limit_batch(max((len(before) + len(after) for _, before, after in others), default=1))
        rest = iter(super()._loglikelihood_tokens(others, **{**options, "disable_tqdm": True}) if others else ())
        scores = [known[place] if place in known else next(rest) for place in range(len(requests))]
        self.requests += len(scores)
        self.not_finite += sum(not math.isfinite(score) for score, _ in scores)
        self._step(sum(text is None for text, _, _ in requests))
        return scores

    def _score_questions(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]]
    ) -> dict[int, tuple[float, bool]]:
        """Return the scores of the requests whose text is that of others too, by place; counts them."""
        if not shares_start(self.model):
            return {}
        rows = [
            ((before + after)[-self.max_length - 1 : -len(after)] if text else [], after)
            for text, before, after in requests
        ]
        scores = score_shared(self.model, rows, self._step)
        return {place: (-score.loss, score.is_greedy) for place, score in scores.items()}

    def _limit_batch(self, tokens: int) -> None:
        """Choose a batch whose logits, of rows of `tokens` tokens, fit with their fp32 log-softmax."""
        tokens, room = min(tokens, self.max_length), room_for_batches(self.model)
        fitting = room.fitting(row_bytes(self.model, tokens, scored=tokens))
        self.batch_size_per_gpu = fitting if room.is_gpu else min(self._rows, fitting)

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
        if stop_ids is None:
            return self._generate(context, max_length, stop, attention_mask, **options)
        rows = zip(context.tolist(), attention_mask.tolist(), strict=True)
        prompts = [[token for token, is_token in zip(row, mask, strict=True) if is_token] for row, mask in rows]
        room = max_length - context.shape[1]

        def answer(rows: Sequence[list[int]]) -> list[list[int]]:
            return greedy(self.model, rows, set(stop_ids), room, self._step)

        answers = in_halves(answer, prompts, self.model)
        texts = [[token for token in answer if token not in stop_ids] for answer in answers]
        width = max(map(len, texts))
        padded = [text + [self.tokenizer.pad_token_id] * (width - len(text)) for text in texts]
        return torch.cat([context, torch.tensor(padded, dtype=torch.long, device=context.device)], dim=1)

    @cached_property
    def _pads(self) -> bool:
        return hides_left_padding(self.model)

    def _generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], mask: torch.Tensor, **options: object
    ) -> torch.Tensor:
        """Return prompts and answers (B, T): row by row where the model reads padding on the left as text."""
        generate = super()._model_generate
        if bool(mask.all()) or self._pads:
            whole: torch.Tensor = generate(context, max_length, stop, attention_mask=mask, **options)
            return whole
        width, answers = context.shape[1], []
        for row, real in zip(context, mask.bool(), strict=True):
            prompt = row[real][None]
            limit = max_length - (width - prompt.shape[1])
            alone = generate(prompt, limit, stop, attention_mask=torch.ones_like(prompt), **options)
            answers.append(alone[0, prompt.shape[1] :])
        padded = pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded], dim=1)
