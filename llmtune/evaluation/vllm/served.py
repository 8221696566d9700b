"""What lm-eval asks a model that vLLM runs: prompts are made as for transformers, and vLLM answers them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerBase

from llmtune.evaluation.loaded_model import LoadedModel
from llmtune.evaluation.vllm.engine import VllmModel


class ServedModel(LoadedModel):
    """A model that vLLM runs, for lm-eval; all requests go to vLLM at once, which makes its own batches."""

    def __init__(
        self,
        served: VllmModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        adds_bos: bool | None,
        name: str,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.served, self.rolls = served, False
        super().__init__(served.skeleton, tokenizer, rows, adds_bos, name, template)
        self.batch_size_per_gpu = 2**20

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return self.served.device

    @property
    def max_length(self) -> int:
        """The tokens of a context; of a window that rolls over a text, those behind its first one."""
        return self.served.longest - 1 if self.rolls else int(super().max_length)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that vLLM has room for."""
        self.rolls = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.rolls = False

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request."""
        rows = [[*before, *after][-self.served.longest :] for _, before, after in requests]
        self.truncated += sum(
            len(before) + len(after) > len(row) for (_, before, after), row in zip(requests, rows, strict=True)
        )
        ends = [
            score[max(0, len(score) - len(after)) :]
            for score, (_, _, after) in zip(self.served.scores(rows), requests, strict=True)
        ]
        scores = [(math.fsum(score for score, _ in end), all(best for _, best in end)) for end in ends]
        self.requests += len(scores)
        self.not_finite += sum(not math.isfinite(score) for score, _ in scores)
        self._step(len(scores))
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
        prompts = [row[mask].tolist() for row, mask in zip(context, attention_mask.bool(), strict=True)]
        answers = self.served.answers(prompts, max_length - context.shape[1], stop_ids, stop)
        if self.prompt_ids:
            self._step(len(answers))
        width = max(map(len, answers), default=0)
        padded = [answer + [self.tokenizer.pad_token_id] * (width - len(answer)) for answer in answers]
        return torch.cat([context, torch.tensor(padded, dtype=torch.long).reshape(len(answers), width)], dim=1)
