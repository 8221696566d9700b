"""Plain texts that are held out: how well a model predicts them, without a question."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import missing_bos, tokenize
from llmtune.data.encoding.plain import slices, with_ends
from llmtune.data.example import IGNORED, Example
from llmtune.data.row import Row
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.held_out.losses import add_losses
from llmtune.evaluation.metrics import finite
from llmtune.evaluation.results import TEXTS_COMPARED, Answer, Result
from llmtune.evaluation.spread.share import spread
from llmtune.working import Step

SHOWN_CHARACTERS = 2000
"""Of a text, that results keep."""
_BATCH = 64
"""Texts that are tokenized at one time."""


@dataclass(frozen=True)
class Texts:
    """Held-out texts, of which a model reads `window` tokens at a time."""

    rows: list[Row]
    of: int
    """Texts that there are; the recipe may limit how many are used."""
    window: int


def windows(row: Row, tokenizer: PreTrainedTokenizerBase, size: int) -> list[list[int]]:
    """Cut a row's text, with BOS and EOS as in training, into windows of `size` tokens that share one with the next.

    So every token but the first is predicted once.
    """
    inside = [token for part in tokenize(tokenizer, list(slices(row.text or "", tokenizer))) for token in part]
    ids = with_ends(row, inside, missing_bos(tokenizer, []), int(tokenizer.eos_token_id))
    return [ids[start : start + size] for start in range(0, max(1, len(ids) - 1), size - 1)]


def score_texts(
    model: PreTrainedModel, texts: Texts, tokenizer: PreTrainedTokenizerBase, limit: int | None, step: Step
) -> tuple[Result, list[Answer]]:
    """Return loss and perplexity on held-out texts, by token, and each text's start with its loss."""
    losses: list[float | None] = []
    tokens: list[int] = []
    pad_id = int(tokenizer.pad_token_id)
    for batch in _batches(texts.rows):
        examples = [
            Example(row.id, row.where, ids, [IGNORED, *ids[1:]])
            for row in batch
            for ids in windows(row, tokenizer, texts.window)
            if len(ids) > 1
        ]
        sums = dict.fromkeys((row.where for row in batch), 0.0)
        counts = dict.fromkeys(sums, 0)
        values = spread(examples, partial(answer_losses, model, pad_id=pad_id), lambda one: len(one.input_ids))
        for example, loss in zip(examples, values, strict=True):
            sums[example.where] += loss
            counts[example.where] += example.supervised
        losses += map(finite, sums.values())
        tokens += counts.values()
        step(len(batch))
    return _result(texts, losses, tokens, limit), _answers(texts.rows, losses, tokens)


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))


def _result(texts: Texts, losses: list[float | None], tokens: list[int], limit: int | None) -> Result:
    result: Result = {
        "shots": 0,
        "n": len(losses),
        "of": texts.of,
        "limit": limit if len(losses) < texts.of else None,
        "version": 1,
        "truncated": 0,
        "not_finite": 0,
        "metrics": {},
        "scores": {},
        "higher_is_better": {},
        "resamples": {},
        "compared": TEXTS_COMPARED,
    }
    add_losses(result, losses, tokens)
    return result


def _answers(rows: list[Row], losses: list[float | None], tokens: list[int]) -> list[Answer]:
    """Return what results keep of each text."""
    return [
        {
            "kind": "text",
            "id": row.id,
            "question": (row.text or "")[:SHOWN_CHARACTERS],
            "prompt": "",
            "answer": "",
            "output": "",
            "loss": None if loss is None or not count else loss / count,
        }
        for row, loss, count in zip(rows, losses, tokens, strict=True)
    ]
