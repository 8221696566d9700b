"""Which metrics held-out answers are scored by: those that the recipe names, or by the data where it names none."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import regex

from llmtune.data.row import Row
from llmtune.errors import FieldError
from llmtune.evaluation.held_out.fields import parsed
from llmtune.working import working

KEY = "eval.metrics"
EXACT_MATCH, JSON, LABELS, ROUGE, CHRF, PERPLEXITY = "exact_match", "json", "labels", "rouge", "chrf", "perplexity"
REGEX = "regex:"
"""What stands before a pattern."""
MOST_LABELS, CHOSEN_LABELS, LABEL_CHARACTERS = 200, 20, 60
"""Labels that can be scored at most, labels up to which they are scored unasked, and characters of one."""
_REPEATED, _CHOSEN_REPEATED = 2, 5
"""Answers for each label, at least: where labels are asked for, and where they are chosen."""
_LONG_CHARACTERS = 80
"""Characters of a usual answer from which on it is a text, of which a part may be right."""
_SAMPLES = 32
MATCH_SECONDS = 2.0
"""How long a pattern may look at one answer."""
_ROUGE_WORD = regex.compile("[a-z0-9]", regex.IGNORECASE)


@dataclass
class AnswerFacts:
    """What decides which metrics apply to true answers."""

    rows: int = 0
    is_json: bool = True
    """Whether every answer is JSON."""
    with_calls: int = 0
    with_thoughts: int = 0
    with_words: int = 0
    """Answers of which ROUGE reads something: it knows Latin letters and digits alone."""
    characters: int = 0
    longest: int = 0
    distinct: set[str] = field(default_factory=set)
    """The different answers, up to one more than labels may be."""
    samples: list[str] = field(default_factory=list)
    """Some answers."""

    def add(self, answer: str, is_call: bool = False, has_thought: bool = False) -> None:
        """Count an answer."""
        self.rows += 1
        if len(self.distinct) <= MOST_LABELS and self.longest <= LABEL_CHARACTERS:
            self.distinct.add(answer)
        answer = answer.strip()
        self.is_json = self.is_json and not is_call and parsed(answer) is not None
        self.with_calls += is_call
        self.with_thoughts += has_thought
        self.with_words += bool(_ROUGE_WORD.search(answer))
        self.characters += len(answer)
        self.longest = max(self.longest, len(answer))
        if len(self.samples) < _SAMPLES:
            self.samples.append(answer)

    def add_row(self, row: Row) -> None:
        """Count the last answer of a conversation."""
        last = row.messages[-1]
        has_thought = bool(last.get("reasoning_content")) or "</think>" in row.answer
        self.add(row.answer, bool(last.get("tool_calls")), has_thought)

    @property
    def labels(self) -> list[str]:
        """The different answers, sorted, where they may be labels."""
        labels = {answer.strip(): answer for answer in sorted(self.distinct)}
        few = 2 <= len(labels) <= self.rows / _REPEATED
        return list(labels.values()) if self.may_be_labels and few else []

    @property
    def may_be_labels(self) -> bool:
        """Whether nothing in these answers speaks against labels: they may be few."""
        plain = not self.with_calls and not self.with_thoughts and self.longest <= LABEL_CHARACTERS
        return plain and len(self.distinct) <= MOST_LABELS

    @property
    def chosen_labels(self) -> list[str]:
        """The labels, where they are so few and repeat so much that they are scored unasked."""
        labels = self.labels
        return labels if len(labels) <= min(CHOSEN_LABELS, self.rows / _CHOSEN_REPEATED) else []


def _facts_of(rows: Iterable[Row]) -> AnswerFacts:
    """Return the facts of rows' last answers; those behind the first one that cannot be a label are not read."""
    facts = AnswerFacts()
    with working("looking for labels in the training rows"):
        for row in rows:
            if row.messages:
                facts.add_row(row)
            if not facts.may_be_labels:
                break
    return facts


def by_data(answers: AnswerFacts, trained: Callable[[], AnswerFacts]) -> tuple[str, ...]:
    """Choose metrics for true answers; `trained` gives the facts of the answers that are trained on."""
    if answers.is_json:
        return (EXACT_MATCH, JSON)
    if answers.may_be_labels and trained().chosen_labels:
        return (EXACT_MATCH, LABELS)
    if answers.with_calls or answers.characters < _LONG_CHARACTERS * answers.rows:
        return (EXACT_MATCH,)
    return (EXACT_MATCH, *([ROUGE] if answers.with_words == answers.rows else []), CHRF)


def choose(
    wanted: Sequence[str] | None, answers: AnswerFacts, train: Iterable[Row]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the metrics of true answers to held-out rows, and the labels where those are scored.

    Exact match is always one of them. Without answers the rows are plain texts, which have a loss and a perplexity
    alone. Raises FieldError, naming the metric, for one that says nothing of these rows.
    """
    if not answers.rows:
        _check_texts(wanted or ())
        return (), ()
    trained = functools.cache(lambda: _facts_of(train))
    metrics = by_data(answers, trained) if wanted is None else tuple(dict.fromkeys((EXACT_MATCH, *wanted)))
    for name in metrics:
        reason = _problem(name, answers, trained)
        if reason:
            raise FieldError(KEY, reason)
    return metrics, tuple(trained().labels) if LABELS in metrics else ()


def _check_texts(wanted: Sequence[str]) -> None:
    name = next((name for name in wanted if name != PERPLEXITY), None)
    if name is not None:
        raise FieldError(KEY, f"{name} needs answers, and the held-out rows are plain texts; try {PERPLEXITY}")


def _problem(name: str, answers: AnswerFacts, trained: Callable[[], AnswerFacts]) -> str | None:
    """Say why a metric does not apply to these answers; None where it does."""
    if name == JSON and not answers.is_json:
        return f"{JSON} needs held-out answers that are all JSON objects or lists; try {EXACT_MATCH} or {CHRF}"
    if name == ROUGE and not answers.with_words:
        return f"{ROUGE} reads Latin letters and digits alone, and no held-out answer has any; try {CHRF}"
    if name == LABELS:
        return _labels_problem(trained())
    return _pattern_problem(name, answers.samples) if name.startswith(REGEX) else None


def _labels_problem(facts: AnswerFacts) -> str | None:
    if facts.labels:
        return None
    if facts.with_calls or facts.with_thoughts:
        reason = f"some have {'tool calls' if facts.with_calls else 'thoughts'}"
    elif facts.longest > LABEL_CHARACTERS:
        reason = f"one has {facts.longest:,} characters"
    elif len(facts.distinct) > MOST_LABELS:
        reason = f"more than {MOST_LABELS} differ"
    else:
        reason = f"{len(facts.distinct)} of {facts.rows} differ"
    limits = f"2 to {MOST_LABELS} different ones of up to {LABEL_CHARACTERS} characters, each repeated"
    return f"{LABELS} needs training answers that are labels ({limits}), and {reason}; try {EXACT_MATCH} or {CHRF}"


def _pattern_problem(name: str, samples: Sequence[str]) -> str | None:
    """Say that a pattern takes too long on some true answer, as it is, cut or with another end."""
    for answer in samples:
        for text in (answer, answer[:-1], f"{answer}\N{DOUBLE EXCLAMATION MARK}"):
            if matches(name, text) is None:
                return slow_words(name)
    return None


def matches(name: str, answer: str) -> bool | None:
    """Tell whether an answer has a match of the pattern of `regex:PATTERN`; None where that takes too long."""
    try:
        return bool(regex.search(name.removeprefix(REGEX), answer, timeout=MATCH_SECONDS))
    except TimeoutError:
        return None


def slow_words(name: str) -> str:
    """Say that a pattern takes too long."""
    reason = f"takes more than {MATCH_SECONDS:g} s on one answer (nested repetition such as (a+)+?)"
    return f"{name} {reason}; write it so that each character can match in one way"
