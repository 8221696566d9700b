"""A model that vLLM runs, asked by token ids: log-likelihoods of tokens, and greedy answers."""

import contextlib
import gc
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmtune.data.encoding.encode import IGNORED, Example
from llmtune.errors import MachineError

Scores = list[tuple[float, bool]]
"""For each token of a row but the first: its log-likelihood, and whether it is the likeliest one."""
KEY = "eval.backend"


def check_installed() -> None:
    """Raise MachineError where vLLM is missing."""
    if find_spec("vllm") is None:
        raise MachineError(f"{KEY}: vllm is not installed; pip install vllm, or use transformers")


class VllmModel(nn.Module):
    """A model whose weights vLLM holds; here are its configuration, and the functions that ask it."""

    def __init__(self, skeleton: PreTrainedModel, engine: Any, dtype: torch.dtype, context: int) -> None:
        """`engine` is a vllm.LLM that was started for a context of so many tokens."""
        super().__init__()
        self.__dict__["skeleton"] = skeleton  # no submodule: its weights are nowhere
        self.engine, self.dtype = engine, dtype
        self.config, self.device = skeleton.config, torch.device("cpu")
        self.longest = context - 1  # vLLM needs room for one token more than it reads

    def scores(self, rows: Sequence[Sequence[int]]) -> list[Scores]:
        """Return for each row of token ids the scores of its tokens but the first."""
        outputs = self._ask(rows, max_tokens=1, prompt_logprobs=1)
        return [
            [_score(token, ranks) for token, ranks in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
            for row, output in zip(rows, outputs, strict=True)
        ]

    def losses(self, examples: list[Example]) -> list[float]:
        """Return the summed negative log-likelihood, in nats, of each example's supervised tokens."""
        scores = self.scores([example.input_ids for example in examples])
        return [
            -sum(score for (score, _), label in zip(row, example.labels[1:], strict=True) if label != IGNORED)
            for row, example in zip(scores, examples, strict=True)
        ]

    def answers(
        self, prompts: Sequence[Sequence[int]], room: int, stop_ids: Sequence[int] | None, stop: Sequence[str]
    ) -> list[list[int]]:
        """Return greedy answers of at most `room` tokens, without the stop token or text that ends them."""
        ends: dict[str, Any] = {"stop": list(stop), "include_stop_str_in_output": True}
        if stop_ids is not None:
            ends = {"stop_token_ids": list(stop_ids), "ignore_eos": True}
        outputs = self._ask(prompts, max_tokens=room, **ends)
        return [[token for token in one.outputs[0].token_ids if token not in (stop_ids or ())] for one in outputs]

    def is_finite(self, tokens: Sequence[int]) -> bool:
        """Tell whether the model's answer to some tokens has a likelihood that is a finite number."""
        row = [*tokens, tokens[-1]][-self.longest :]
        return all(math.isfinite(score) for score, _ in self.scores([row])[0])

    def close(self) -> None:
        """Give back the memory of vLLM, which ends its processes when nothing holds it any more."""
        self.engine = None
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def _ask(self, rows: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        parameters = SamplingParams(temperature=0.0, **options)
        return list(self.engine.generate(prompts, parameters, use_tqdm=False))


def start_engine(folder: Path, dtype: torch.dtype, context: int) -> Any:
    """Start vLLM on a folder of weights."""
    from vllm import LLM

    name = str(dtype).removeprefix("torch.")
    return LLM(model=str(folder), dtype=name, max_model_len=context, trust_remote_code=False, seed=0)


def _score(token: int, found: Any) -> tuple[float, bool]:
    """The score of a token in vLLM's answer, which holds it and the likeliest one."""
    best = max(one.logprob for one in found.values())
    return float(found[token].logprob), found[token].logprob >= best
