"""The general questions and texts of eval/general, and a model's scores on them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import missing_bos, tokenize
from llmtune.data.example import IGNORED, Example
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.metrics import finite, score
from llmtune.evaluation.results import GENERAL_QUESTIONS, GENERAL_TEXTS, Result
from llmtune.evaluation.spread.share import spread
from llmtune.files import digest_of, shipped_folder
from llmtune.working import Step

VERSION = 1


@dataclass(frozen=True)
class General:
    """General questions and texts as a tokenizer encodes them."""

    questions: list[list[Example]]
    """Each question with its right end first, then with each wrong one; the end alone is scored."""
    lengths: list[list[int]]
    """Characters of the ends."""
    texts: list[Example]
    sha256: str
    """Of all questions and texts, before they are encoded."""


def load_general(tokenizer: PreTrainedTokenizerBase, context: int) -> General:
    """Read and encode the shipped questions and texts for a context of so many tokens."""
    folder = shipped_folder("eval") / "general"
    rows, texts = _read(folder / "questions.jsonl"), _read(folder / "texts.jsonl")
    ends = [[row["answer"], *row["others"]] for row in rows]
    return General(
        questions=[_question(row, tokenizer, context) for row in rows],
        lengths=[[len(end) for end in of_row] for of_row in ends],
        texts=[_text(row, tokenizer, context) for row in texts],
        sha256=digest_of([rows, texts]),
    )


def ask_general(
    general: General, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: Step | None = None
) -> dict[str, Result]:
    """Return a model's accuracy on the questions, by the likelihood per character, and its loss on the texts."""
    ends = [example for question in general.questions for example in question]
    ask = partial(answer_losses, model, pad_id=int(tokenizer.pad_token_id), step=step)
    # The ends of a question are scored after one pass over it.
    losses = spread([*ends, *general.texts], ask, lambda one: len(one.input_ids), lambda one: one.id)
    of_ends, of_texts = losses[: len(ends)], [finite(loss) for loss in losses[len(ends) :]]
    right = [
        _is_right([of_ends[4 * number + place] / length for place, length in enumerate(lengths)])
        for number, lengths in enumerate(general.lengths)
    ]
    tokens = [example.supervised for example in general.texts]
    loss = score([math.nan if one is None else one for one in of_texts], tokens)
    accuracy = score([math.nan if one is None else one for one in right])
    texts = _result(len(tokens), {"loss": loss}, {"loss": of_texts}, better=False)
    return {
        GENERAL_QUESTIONS: _result(len(right), {"acc": accuracy}, {"acc": right}, better=True),
        GENERAL_TEXTS: {**texts, "tokens": tokens},
    }


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Example]:
    """Encode a question with each of its ends, of which the tokens that the question does not start with are scored."""
    question = row["question"]
    complete = [f"{question} {end}" for end in (row["answer"], *row["others"])]
    start, *encoded = tokenize(tokenizer, [question, *complete])
    bos = missing_bos(tokenizer, start)
    examples = []
    for ids in encoded:
        same = next((place for place, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), len(start))
        labels = [*[IGNORED] * (len(bos) + same), *ids[same:]]
        if not (bos or same):
            labels[0] = IGNORED  # nothing predicts a first token
        examples.append(Example(row["id"], row["id"], [*bos, *ids][-context:], labels[-context:]))
    return examples


def _text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int) -> Example:
    (ids,) = tokenize(tokenizer, [row["text"]])
    ids = [*missing_bos(tokenizer, ids), *ids][:context]
    return Example(row["id"], row["id"], ids, [IGNORED, *ids[1:]])


def _is_right(losses: Sequence[float]) -> float | None:
    """Return 1.0 where the first end, which is right, is likelier than each other one; None where one is not finite."""
    if not all(map(math.isfinite, losses)):
        return None
    return float(losses[0] < min(losses[1:]))


def _result(rows: int, metrics: dict[str, Any], scores: dict[str, list[float | None]], better: bool) -> Result:
    (values,) = scores.values()
    return {
        "shots": 0,
        "n": rows,
        "of": rows,
        "limit": None,
        "version": VERSION,
        "truncated": 0,
        "not_finite": sum(value is None for value in values),
        "metrics": metrics,
        "scores": scores,
        "higher_is_better": dict.fromkeys(metrics, better),
        "resamples": {},
    }
