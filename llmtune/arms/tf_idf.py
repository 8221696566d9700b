"""A linear model over TF-IDF: what a tuned model has to beat where answers repeat like labels."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.data.gate import split_rows
from llmtune.data.row import Row
from llmtune.evaluation.held_out.choice import AnswerFacts
from llmtune.evaluation.held_out.truth import Truth, kinds_of, same
from llmtune.recipe.sections import Recipe
from llmtune.working import working

MANY = 20_000
"""Training rows above which parts of words are not counted: they take minutes and gigabytes there."""


@dataclass(frozen=True)
class TfIdf:
    """What a linear model over TF-IDF answers to held-out rows."""

    answers: list[str]
    scores: list[float]
    """Exact match of each answer, 0 or 1."""
    labels: int
    """The different answers that it knows."""
    trained: int
    """Rows that it learned from."""
    seconds: float

    @property
    def score(self) -> float:
        """The share of right answers."""
        return sum(self.scores) / len(self.scores)


def score_tf_idf(recipe: Recipe) -> TfIdf | str:
    """Train on a recipe's training rows and score its held-out ones, as an evaluation does; or say why it cannot be.

    A recipe of 2,000 short rows takes a second. Raises RecipeError for bad rows.
    """
    train, held_out = split_rows(recipe.data, recipe.train.seed)
    asked = itertools.islice((row for row in held_out if row.messages), recipe.eval.limit)
    return compare_tf_idf(train, list(asked))


def compare_tf_idf(train: Iterable[Row], held_out: Sequence[Row]) -> TfIdf | str:
    """Train on some rows and score others by exact match of their last answer; or say why it cannot be."""
    began = time.monotonic()
    learned = list(train)
    reason = _problem(learned, held_out)
    if reason:
        return reason
    with working("training a linear model over TF-IDF"):
        model = _pipeline(len(learned))
        model.fit([_question(row) for row in learned], [row.answer for row in learned])
        answers = [str(answer) for answer in model.predict([_question(row) for row in held_out])]
    truths = [Truth.of_text(row.answer) for row in held_out]
    compared = zip(answers, truths, kinds_of(truths), strict=True)
    scores = [float(same(answer, truth.final, kind)) for answer, truth, kind in compared]
    labels = len({row.answer for row in learned})
    return TfIdf(answers, scores, labels, len(learned), time.monotonic() - began)


def _problem(train: Sequence[Row], held_out: Sequence[Row]) -> str | None:
    """Say why answers cannot be predicted as labels; held-out ones count too, as a few rows show few repetitions."""
    if not held_out:
        return "no held-out row is a question"
    if not all(row.messages for row in train):
        return "training rows are plain texts"
    facts = AnswerFacts()
    for row in (*train, *held_out):
        facts.add_row(row)
    if facts.with_calls:
        return "some answers call tools"
    if not facts.labels:
        return "answers do not repeat like labels"
    if len({row.answer for row in train}) < 2:
        return "all training rows have the same answer"
    if not any(any(map(str.isalnum, _question(row))) for row in train):
        return "questions have no words"
    return None


def _question(row: Row) -> str:
    """The last text of the user before the answer; all turns before it where no user speaks."""
    prompt = row.messages[:-1]
    said = [turn for turn in prompt if turn["role"] == "user"][-1:] or prompt
    return "\n".join(str(turn.get("content") or "") for turn in said)


def _pipeline(rows: int) -> Any:
    """Words, pairs of words and parts of words, weighed by how rare they are, and a linear support vector machine."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return make_pipeline(make_union(*[words] if rows > MANY else [words, parts]), LinearSVC(random_state=0))
