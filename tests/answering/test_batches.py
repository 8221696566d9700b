"""Answers in batches: each is the answer that its row gets alone, greedy or drawn, within the context."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmtune.answering import batches
from llmtune.answering.batches import Answerer, Ask
from llmtune.answering.draw import drawn
from llmtune.answering.models import Models, Prompts
from llmtune.answering.sampling import Sampling
from llmtune.evaluation.generate import greedy
from tests.support import tiny

ROWS = {Ask(0, 0): [40, 41, 42], Ask(1, 0): [40, 50], Ask(1, 1): [40, 50], Ask(2, 0): list(range(40, 57))}


def answers(model: Any, sampling: Sampling, context: int = 512, rows: Any = ROWS) -> dict[Ask, list[int]]:
    """Return the tokens of the answer to each prompt."""
    prompts = Prompts(tiny.tokenizer(), {2}, {}, "learn", "")
    answerer, counted = Answerer(Models(model, nullcontext), prompts, sampling, context), list[float]()
    batched = answerer.answer(rows, lambda amount=1: counted.append(amount))
    tokens = {ask: ids for batch in batched for ask, ids in zip(*batch, strict=True)}
    assert sum(counted) == pytest.approx(len(rows))
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_depends_on_no_other_row(kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(kind, initializer_range=0.5).eval()
    sampling = Sampling(temperature, top_k=20, max_new_tokens=6)
    together = answers(model, sampling)
    alone = {ask: answers(model, sampling, rows={ask: ids})[ask] for ask, ids in ROWS.items()}
    assert together == alone
    assert (together[Ask(1, 0)] != together[Ask(1, 1)]) == bool(temperature)
    if temperature:
        assert answers(model, Sampling(temperature, top_k=20, max_new_tokens=6, seed=1)) != together
    real = greedy

    def small(model: Any, prompts: Any, *others: Any) -> Any:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, prompts, *others)

    monkeypatch.setattr(batches, "greedy", small)
    assert answers(model, sampling) == together


def test_an_answer_ends_with_the_context() -> None:
    tokens = answers(tiny.model().eval(), Sampling(max_new_tokens=8), context=20)
    assert [len(tokens[ask]) for ask in ROWS] == [8, 8, 8, 3]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(2.0, top_p=0.6), Sampling(1.0, top_k=3), Sampling(1.3, top_p=0.5, top_k=5)]
)
def test_draws_with_the_probabilities_of_transformers(sampling: Sampling) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    scores = TopKLogitsWarper(sampling.top_k or 12)(None, scores)
    expected = TopPLogitsWarper(sampling.top_p)(None, scores).softmax(-1)[0]
    points = (torch.arange(4000) + 0.5) / 4000
    counts = drawn(logits.expand(4000, -1), sampling, points).bincount(minlength=12) / 4000
    assert (counts - expected).abs().max() < 5e-4
    assert drawn(logits, Sampling(1e-30), torch.tensor([0.999])).item() == logits.argmax()
