"""Labels by likelihood: which of the answers that were trained on a model holds for the likeliest after each prompt.

So a model that answers in other words is judged too. A label's likelihood is that of its whole text with its stop
token, as training has it: the probability that the model answers just that.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy
from lm_eval.api.metrics import mean
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.evaluation.aggregates import OfSums, add_metric
from llmtune.evaluation.generate import answer_losses
from llmtune.evaluation.metrics import Array
from llmtune.evaluation.questions import Questions, last_answer_alone
from llmtune.evaluation.results import Result
from llmtune.evaluation.spread.share import of_all, spread
from llmtune.working import Step

ACCURACY, MACRO_F1 = "label_accuracy", "label_f1"


class LabelTexts(NamedTuple):
    """The labels of a data set, and how they are encoded."""

    labels: tuple[str, ...]
    """The answers as they are trained on."""
    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    rules: Rules

    def examples(self, row: Row) -> dict[str, Example]:
        """Encode a row once for each label as its answer, by label; without those with which it is too long."""
        named = {f"{row.where}, label {place}": label for place, label in enumerate(self.labels)}
        rows = [
            replace(row, where=where, messages=(*row.messages[:-1], {"role": "assistant", "content": label}))
            for where, label in named.items()
        ]
        encoded = encode(rows, self.tokenizer, self.stop, self.rules)
        return {named[example.where].strip(): last_answer_alone(example) for example in encoded.examples}


def likeliest(model: PreTrainedModel, rows: Questions, texts: LabelTexts, step: Step) -> list[str | None]:
    """Return the likeliest label of each row; None where no label has a finite likelihood.

    One pass reads a row's prompt, and its labels share it.
    """
    known = _alike(rows, texts)

    def answer(asked: tuple[Row, Example]) -> str | None:
        row, example = asked
        candidates = _appended(example, known, texts.rules.max_length) if known else texts.examples(row)
        losses = answer_losses(model, list(candidates.values()), int(texts.tokenizer.pad_token_id))
        finite = [(loss, label) for loss, label in zip(losses, candidates, strict=True) if math.isfinite(loss)]
        of_all(step)()
        return min(finite)[1] if finite else None

    pairs = list(zip(rows.rows, rows.examples, strict=True))
    return spread(pairs, lambda part: list(map(answer, part)), lambda one: len(one[1].input_ids))


def add_labels(result: Result, name: str, given: Sequence[str | None], true: Sequence[str]) -> None:
    """Add the accuracy of labels and their F1 as the mean over all labels, rare ones counting as much as others."""
    from sklearn.metrics import accuracy_score, f1_score

    answers = ["" if label is None else label for label in given]
    classes = sorted({*answers, *true})
    rows = len(true)
    items = dict(enumerate(float(a == b) for a, b in zip(answers, true, strict=True)))
    add_metric(result, name, ACCURACY, float(accuracy_score(true, answers)), mean, items, rows)
    statistics = dict(enumerate(_statistics(answers, true, classes)))
    value = float(f1_score(true, answers, average="macro", zero_division=0.0))
    add_metric(result, name, MACRO_F1, value, OfSums(macro_f1), statistics, rows)
    result["higher_is_better"] |= {ACCURACY: True, MACRO_F1: True}


def _statistics(given: Sequence[str], true: Sequence[str], classes: Sequence[str]) -> list[Array]:
    """Return each row's counts (2K) over K classes: right answers first, then answers and true answers together."""
    place = {label: number for number, label in enumerate(classes)}
    rows = []
    for answer, truth in zip(given, true, strict=True):
        right, either = numpy.zeros(len(classes)), numpy.zeros(len(classes))
        right[place[truth]] = answer == truth
        either[place[answer]] += 1
        either[place[truth]] += 1
        rows.append(numpy.concatenate([right, either]))
    return rows


def macro_f1(sums: Array) -> Array:
    """Return the mean F1 (R,) over the classes that occur, of sums (R, 2K)."""
    right, either = numpy.split(sums, 2, axis=1)
    occurs = either > 0
    return (2 * right / numpy.where(occurs, either, 1)).sum(1) / occurs.sum(1)


def _alike(rows: Questions, texts: LabelTexts) -> dict[str, Example]:
    """Return the labels as the shortest row has them, where they are the same tokens after every prompt; else none."""
    shortest = min(range(len(rows.rows)), key=lambda place: rows.examples[place].prompt_size)
    known = texts.examples(rows.rows[shortest])
    for example, truth in zip(rows.examples, rows.truths, strict=True):
        own = known.get(truth.final.strip())
        if own and list(own.input_ids[own.prompt_size :]) != list(example.input_ids[example.prompt_size :]):
            return {}
    return known


def _appended(example: Example, labels: dict[str, Example], longest: int) -> dict[str, Example]:
    """Return a row's prompt followed by each label that fits."""
    prompt = list(example.input_ids[: example.prompt_size])
    unlearned = list(example.labels[: example.prompt_size])
    return {
        label: replace(
            example,
            input_ids=prompt + list(own.input_ids[own.prompt_size :]),
            labels=unlearned + list(own.labels[own.prompt_size :]),
        )
        for label, own in labels.items()
        if len(prompt) + len(own.input_ids) - own.prompt_size <= longest
    }
